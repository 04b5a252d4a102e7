"""The draft model: it guesses what it would generate itself, and keeps up with its sequences."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch

from ernie45.backends.base import Batch, BuildOptions, Step
from ernie45.backends.kv_cache import KVCache
from ernie45.backends.text import TextBackend, build_text
from ernie45.engine.batches import Run, text_batch
from ernie45.engine.speculation.draft_model import DraftModel
from ernie45.engine.speculation.proposer import Ask
from ernie45.engine.speculation.speculation import Checked, Speculation
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.sampling import build_sampler
from ernie45.types.placement import Placement
from ernie45.types.requests import Sampling
from tests.backends.test_text import RandomTensors, spec

CONTEXT = 1300
V = 300


class Recording:
    """A backend that keeps what it ran."""

    def __init__(self, backend: TextBackend) -> None:
        self._backend = backend
        self.spec, self.dtype, self.device = backend.spec, backend.dtype, backend.device
        self.weight_bytes = backend.weight_bytes
        self.ran: list[dict[int, list[int]]] = []

    def forward(self, batch: Batch) -> Step:
        ids = iter(batch.token_ids.tolist())
        self.ran.append({row.slot: [next(ids) for _ in range(row.num_tokens)] for row in batch.rows})
        return self._backend.forward(batch)


def make_backend() -> TextBackend:
    shape = spec()
    options = BuildOptions.unquantised(shape, dtype=torch.float32, device="cpu", context_tokens=CONTEXT)
    return build_text(shape, RandomTensors(), options)


def make_cache(num_slots: int) -> KVCache:
    return KVCache.allocate(
        spec(),
        num_slots=num_slots,
        context_tokens=CONTEXT,
        dtype=torch.float32,
        kv_dtype="auto",
        placement=Placement.on("cpu", 2),
    )


@pytest.fixture
def backend() -> Recording:
    return Recording(make_backend())


@pytest.fixture
def draft(backend: Recording) -> DraftModel:
    return DraftModel(backend, make_cache(3), context_tokens=CONTEXT)


def ask(slot: int, token_ids: list[int], most: int = 4) -> Ask:
    sampler = build_sampler(
        Sampling(temperature=0), num_token_ids=V, vocab_size=V, prompt_ids=token_ids, device=torch.device("cpu")
    )
    return Ask(slot=slot, token_ids=token_ids, most=most, sampler=sampler)


def guess(draft: DraftModel, asks: Sequence[Ask]) -> list[list[int]]:
    draft.read(asks)
    return draft.propose(asks)


def own_continuation(token_ids: Sequence[int], most: int = 4) -> list[int]:
    """What the same model says greedily, every token computed from the beginning."""
    backend, ids = make_backend(), list(token_ids)
    for _ in range(most):
        run = Run(slot=0, start=0, token_ids=ids, wanted=(len(ids) - 1,))
        logits = backend.forward(text_batch([run], make_cache(1), backend.device)).logits
        ids.append(int(logits[0].argmax()))
    return ids[len(token_ids) :]


def prompt(seed: int, length: int = 20) -> list[int]:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_it_guesses_its_own_continuation(draft: DraftModel) -> None:
    assert guess(draft, [ask(1, prompt(1))]) == [own_continuation(prompt(1))]


def test_rows_of_different_lengths_run_together(draft: DraftModel, backend: Recording) -> None:
    asks = [ask(0, prompt(1), most=2), ask(2, prompt(2, 7), most=4), ask(1, prompt(3, 30), most=1)]
    assert guess(draft, asks) == [own_continuation(each.token_ids, each.most) for each in asks]
    assert [sorted(rows) for rows in backend.ran] == [[0, 1, 2], [0, 1, 2], [0, 2], [2], [2]]
    assert [len(backend.ran[0][slot]) for slot in range(3)] == [19, 29, 6], "the prompts but for their last tokens"


@pytest.mark.parametrize("num_accepted", [0, 1, 3, 4])
def test_only_what_is_new_is_run_after_some_guesses_were_right(
    draft: DraftModel, backend: Recording, num_accepted: int
) -> None:
    ids = prompt(1)
    guesses = guess(draft, [ask(0, ids)])[0]
    ids = [*ids, *guesses[:num_accepted], 17]  # 17 is what the large model says in place of a guess, or after all
    backend.ran.clear()
    assert guess(draft, [ask(0, ids)]) == [own_continuation(ids)]
    # Of four guesses the last was not run yet.
    assert backend.ran[0] == {0: [guesses[3], 17] if num_accepted == 4 else [17]}


def test_it_catches_up_on_what_was_generated_without_it(draft: DraftModel, backend: Recording) -> None:
    ids = prompt(1)
    guess(draft, [ask(0, ids)])
    ids = [*ids, *prompt(5, 9)]
    backend.ran.clear()
    assert guess(draft, [ask(0, ids)]) == [own_continuation(ids)]
    assert sum(len(rows[0]) for rows in backend.ran) <= 9 + 3


def test_what_is_not_read_is_not_guessed(draft: DraftModel, backend: Recording) -> None:
    draft.propose([ask(0, prompt(1)), ask(1, prompt(2))])
    assert backend.ran == []


def test_reading_a_prompt_is_no_price_of_a_guess() -> None:
    class Slow(Recording):
        def forward(self, batch: Batch) -> Step:
            time.sleep(0.001 * len(batch.token_ids))
            return super().forward(batch)

    speculation = Speculation(DraftModel(Slow(make_backend()), make_cache(1), context_tokens=CONTEXT))
    ids = prompt(1, 400)
    counts = []
    for _ in range(4):
        (guesses,) = speculation.propose([ask(0, ids, most=4)])
        counts.append(len(guesses))
        checked = Checked(slot=0, num_proposed=len(guesses), num_accepted=len(guesses))
        speculation.note_step([checked], seconds=0.09 + 0.01 * len(guesses))
        ids = [*ids, *guesses, 17]
    assert min(counts) >= 3, "where a guess takes a few milliseconds, and a step 100"


def test_a_long_prompt_is_read_in_chunks_and_holds_up_nobody(draft: DraftModel, backend: Recording) -> None:
    long, short = prompt(4, 2 * PREFILL_CHUNK_TOKENS + 10), prompt(2)
    for _ in range(2):
        assert guess(draft, [ask(0, long), ask(1, short)]) == [[], own_continuation(short)]
    backend.ran.clear()
    assert guess(draft, [ask(0, long)]) == [own_continuation(long)]
    assert all(len(ids) <= PREFILL_CHUNK_TOKENS for rows in backend.ran for ids in rows.values())


def test_a_slot_that_begins_the_same_is_not_read_again(draft: DraftModel, backend: Recording) -> None:
    shared = prompt(1)
    guess(draft, [ask(0, shared)])
    draft.forget(0)
    draft.forget(0)
    draft.forget(2)  # of which it never heard
    backend.ran.clear()
    follower = [*shared[:15], *prompt(6, 5)]
    assert guess(draft, [ask(0, follower)]) == [own_continuation(follower)]
    assert backend.ran[:2] == [{0: follower[15:-1]}, {0: follower[-1:]}]
    backend.ran.clear()
    draft.forget(0)
    assert guess(draft, [ask(0, follower[:10])]) == [own_continuation(follower[:10])]
    assert backend.ran[0] == {0: follower[9:10]}


def test_at_the_end_of_its_context_it_stops_guessing(draft: DraftModel, backend: Recording) -> None:
    full = [*prompt(1, 20)]
    short = DraftModel(backend, make_cache(1), context_tokens=24)
    assert len(guess(short, [ask(0, full, most=4)])[0]) == 4
    assert guess(short, [ask(0, [*full, 1], most=4)]) == [[]]
    assert len(guess(short, [ask(0, [*full, 1], most=3)])[0]) == 3
