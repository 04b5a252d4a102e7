"""Speculation: what is asked of a proposer, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie45.engine.speculation.proposer import Ask
from ernie45.engine.speculation.speculation import Checked, Speculation
from ernie45.memory.workspace import MAX_STEP_GUESSES
from ernie45.sampling import build_sampler
from ernie45.types.requests import Sampling

SAMPLER = build_sampler(
    Sampling(temperature=0), num_token_ids=100, vocab_size=100, prompt_ids=[], device=torch.device("cpu")
)


class Ones:
    """Guesses that everything goes on with ones."""

    max_tokens = 6
    wants_hidden = False

    def __init__(self) -> None:
        self.asked: list[dict[int, int]] = []
        self.forgotten: list[int] = []

    def read(self, asks: Sequence[Ask]) -> None:
        pass

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.asked.append({ask.slot: ask.most for ask in asks})
        return [[1] * ask.most for ask in asks]

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        raise AssertionError("not wanted")

    def forget(self, slot: int) -> None:
        self.forgotten.append(slot)


def ask(slot: int, most: int = 20) -> Ask:
    return Ask(slot=slot, token_ids=[1, 2, 3], most=most, sampler=SAMPLER)


def check(slot: int, proposed: int, accepted: int) -> Checked:
    return Checked(slot=slot, num_proposed=proposed, num_accepted=accepted)


def run(speculation: Speculation, slots: Sequence[int], right: dict[int, bool], seconds: float = 0.01) -> list[int]:
    """One step; the number of guesses of each sequence."""
    proposals = speculation.propose([ask(slot) for slot in slots])
    counts = [len(proposed) for proposed in proposals]
    speculation.note_step(
        [check(slot, count, count if right[slot] else 0) for slot, count in zip(slots, counts, strict=True)],
        seconds * (1 + 0.1 * sum(counts)),
    )
    return counts


def test_no_more_is_asked_than_there_is_room_for() -> None:
    proposer = Ones()
    speculation = Speculation(proposer)
    for _ in range(20):
        run(speculation, [0], {0: True})
    assert speculation.propose([ask(0, most=2)]) == [[1, 1]]
    assert speculation.propose([ask(0)]) == [[1] * proposer.max_tokens]
    assert speculation.propose([ask(0, most=0)]) == [[]]


def test_rows_share_what_a_step_may_check() -> None:
    speculation = Speculation(Ones())
    slots = list(range(7))
    for _ in range(20):
        counts = run(speculation, slots, dict.fromkeys(slots, True))
        assert sum(counts) <= MAX_STEP_GUESSES
    assert counts == [2] * 7
    assert sum(run(speculation, range(40), dict.fromkeys(range(40), True))) == 0


def test_each_sequence_has_its_own_measure() -> None:
    proposer = Ones()
    speculation = Speculation(proposer)
    for _ in range(60):
        counts = run(speculation, [4, 9], {4: True, 9: False})
    assert counts == [6, 0]
    assert proposer.asked[-1] == {4: 6}


def test_a_slot_that_is_forgotten_begins_anew() -> None:
    proposer = Ones()
    speculation = Speculation(proposer)
    for _ in range(60):
        run(speculation, [2], {2: False})
    assert run(speculation, [2], {2: False}) == [0]
    speculation.forget(2)
    assert proposer.forgotten == [2]
    assert run(speculation, [2], {2: False})[0] > 0


def test_it_counts_what_was_guessed_and_what_was_right() -> None:
    speculation = Speculation(Ones())
    speculation.propose([ask(0), ask(1)])
    speculation.forget(1)  # it ended with this step
    speculation.note_step([check(0, 3, 2), check(1, 1, 1), check(2, 0, 0)], 0.01)
    assert (speculation.num_proposed, speculation.num_accepted) == (4, 3)


def test_nobody_is_asked_where_nothing_is_wanted() -> None:
    proposer = Ones()
    assert Speculation(proposer).propose([]) == []
    assert Speculation(proposer).propose([ask(0, most=0)]) == [[]]
    assert proposer.asked == []
