"""The prediction head's bookkeeping: which state meets which token, at which place of which slot."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.backends.base import Batch
from ernie45.engine.speculation.mtp import MtpProposer
from ernie45.engine.speculation.proposer import Ask
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.sampling import build_sampler
from ernie45.types.requests import Sampling
from tests.engine.speculation.test_draft_model import make_cache

V = 60


class PairingHead:
    """States are positions; guesses the sum of state and token, and keeps what each slot was given, in place."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, int]]] = {}
        self.widths: list[int] = []

    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        assert hidden.shape == (len(batch.token_ids), 1)
        self.widths.append(len(hidden))
        for slot, place, token, state in zip(
            batch.slots.tolist(), batch.positions.tolist(), batch.token_ids.tolist(), hidden[:, 0].tolist(), strict=True
        ):
            pairs = self.seen.setdefault(slot, [])
            assert place <= len(pairs), "no place is left out"
            pairs[place:] = [(int(state), token)]
        sums = (hidden[:, 0].long() + batch.token_ids)[batch.wanted] % V
        return torch.nn.functional.one_hot(sums, V).float()


def states(start: int, end: int) -> Tensor:
    return torch.arange(start, end)[:, None].float()


def ask(slot: int, token_ids: list[int]) -> Ask:
    sampler = build_sampler(
        Sampling(temperature=0), num_token_ids=V, vocab_size=V, prompt_ids=[], device=torch.device("cpu")
    )
    return Ask(slot=slot, token_ids=token_ids, most=1, sampler=sampler)


def test_each_state_meets_the_token_after_it() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(3))
    ids = [20, 21, 22, 23]
    proposer.observe(1, ids, 0, states(0, 4))
    assert proposer.propose([ask(1, [*ids, 24])]) == [[24 + 3]]
    assert head.seen == {1: [(0, 21), (1, 22), (2, 23), (3, 24)]}
    # Of the step after it two tokens stayed, and a third was drawn.
    ids += [24, 30, 31]
    proposer.observe(1, ids, 4, states(4, 6))
    assert proposer.propose([ask(1, ids)]) == [[31 + 5]]
    assert head.seen[1][4:] == [(4, 30), (5, 31)]
    assert head.widths == [4, 2]


def test_rows_run_together() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(3))
    proposer.observe(0, [5, 6, 7], 0, states(0, 2))
    proposer.observe(2, [1], 0, states(0, 1))
    assert proposer.propose([ask(2, [1, 2]), ask(0, [5, 6, 7])]) == [[2], [8]]
    assert head.seen == {2: [(0, 2)], 0: [(0, 6), (1, 7)]}
    assert head.widths == [3]


def test_a_long_prompt_is_run_chunk_by_chunk() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(1))
    chunk = PREFILL_CHUNK_TOKENS
    ids = [index % V for index in range(2 * chunk)]
    proposer.observe(0, ids, 0, states(0, chunk))
    proposer.observe(0, ids, chunk, states(chunk, 2 * chunk))
    assert head.widths == [chunk - 1], "before more wait"
    proposer.read([ask(0, [*ids, 3])])
    assert head.widths == [chunk - 1, chunk], "all but the last, which gives the guess"
    assert proposer.propose([ask(0, [*ids, 3])]) == [[(3 + 2 * chunk - 1) % V]]
    assert head.widths[2:] == [1]
    assert head.seen[0] == [(place, (place + 1) % V) for place in range(2 * chunk - 1)] + [(2 * chunk - 1, 3)]


def test_steps_without_a_guess_are_made_up_for() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(1))
    ids = [20, 21, 22]
    proposer.observe(0, ids, 0, states(0, 3))
    for place in range(3, 8):
        ids.append(20 + place)
        proposer.observe(0, ids, place, states(place, place + 1))
    ids.append(28)
    assert proposer.propose([ask(0, ids)]) == [[28 + 7]]
    assert head.seen[0] == [(place, 21 + place) for place in range(8)]


def test_states_of_many_rows_are_no_more_than_a_chunk() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(40))
    ids = {slot: [slot] for slot in range(40)}
    for place in range(60):
        step = states(place, place + 1).expand(40, 1)  # one tensor for all rows, as steps give it
        for slot, token_ids in ids.items():
            token_ids.append((slot + place) % V)
            proposer.observe(slot, token_ids, place, step[slot : slot + 1])
            waiting = [state for row in proposer._rows.values() for state in row.waiting]
            assert sum(map(len, waiting)) <= PREFILL_CHUNK_TOKENS
            held = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in waiting}
            assert sum(held.values()) <= 4 * PREFILL_CHUNK_TOKENS, "no views of what others have done with"
    assert max(head.widths) <= PREFILL_CHUNK_TOKENS
    guesses = proposer.propose([ask(slot, token_ids) for slot, token_ids in ids.items()])
    assert guesses == [[(token_ids[-1] + 59) % V] for token_ids in ids.values()]
    assert all(head.seen[slot] == list(enumerate(token_ids[1:])) for slot, token_ids in ids.items())


def test_few_states_are_run_with_the_guess() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(1))
    proposer.read([ask(0, [20, 21])])
    proposer.observe(0, [20, 21, 22], 0, states(0, 2))
    proposer.read([ask(0, [20, 21, 22])])
    assert head.widths == []
    proposer.propose([ask(0, [20, 21, 22])])
    assert head.widths == [2]


def test_a_prefix_that_was_taken_over_is_done_without() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(1))
    ids = [20, 21, 22, 23, 24]
    proposer.observe(0, ids, 3, states(3, 5))
    assert proposer.propose([ask(0, [*ids, 25])]) == [[25 + 4]]
    assert head.seen[0] == [(3, 24), (4, 25)]


def test_without_the_last_states_there_is_no_guess() -> None:
    head = PairingHead()
    proposer = MtpProposer(head, make_cache(2))
    assert proposer.propose([ask(0, [1, 2, 3])]) == [[]]
    proposer.observe(0, [1, 2, 3], 0, states(0, 2))
    assert proposer.propose([ask(0, [1, 2, 3, 4])]) == [[]]
    proposer.observe(0, [1, 2, 3, 4], 3, states(3, 4))  # with a gap: it begins anew
    assert proposer.propose([ask(0, [1, 2, 3, 4, 5])]) == [[8]]
    assert head.seen == {0: [(3, 5)]}
    proposer.forget(0)
    proposer.forget(0)
    assert proposer.propose([ask(0, [1, 2, 3, 4, 5])]) == [[]]
