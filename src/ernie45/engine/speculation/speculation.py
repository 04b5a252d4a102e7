"""Speculation: which running sequences guess how many tokens, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from ernie45.engine.speculation.control import Acceptance, StepTimes
from ernie45.engine.speculation.proposer import Ask, Proposer
from ernie45.memory.workspace import MAX_STEP_GUESSES


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One sequence's part in a step: the first `num_accepted` of its `num_proposed` guesses were right."""

    slot: int
    num_proposed: int
    num_accepted: int


@final
class Speculation:
    """Guesses with `proposer` for the sequences of an engine. `num_proposed` and `num_accepted` count all tokens."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer: Proposer | None = proposer
        self._times = StepTimes()
        self._acceptance: dict[int, Acceptance] = {}
        self.wants_hidden = proposer.wants_hidden
        self.num_proposed = 0
        self.num_accepted = 0

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Guesses for each sequence, none where they would not pay; `most` is what the sequence has room for."""
        assert self._proposer is not None
        cost = self._times.cost(max(1, len(asks)))
        share = min(self._proposer.max_tokens, MAX_STEP_GUESSES // max(1, len(asks)))
        wanted = {}
        for place, ask in enumerate(asks):
            acceptance = self._acceptance.setdefault(ask.slot, Acceptance())
            most = acceptance.num_worthwhile(cost, min(ask.most, share))
            if most:
                wanted[place] = replace(ask, most=most)
        proposals: list[list[int]] = [[] for _ in asks]
        if not wanted:
            return proposals
        asked = list(wanted.values())
        self._proposer.read(asked)
        started = time.perf_counter()
        for place, proposed in zip(wanted, self._proposer.propose(asked), strict=True):
            proposals[place] = proposed
        num_tokens = sum(map(len, proposals))
        if num_tokens:
            self._times.note_guesses(num_tokens=num_tokens, seconds=time.perf_counter() - started)
        return proposals

    def note_step(self, checked: Sequence[Checked], seconds: float) -> None:
        """What a step of these sequences came to."""
        self._times.note_step(num_tokens=sum(1 + each.num_proposed for each in checked), seconds=seconds)
        for each in checked:
            self.num_proposed += each.num_proposed
            self.num_accepted += each.num_accepted
            acceptance = self._acceptance.get(each.slot)  # forgotten where the step was its last
            if acceptance is not None and each.num_proposed:
                acceptance.note(num_proposed=each.num_proposed, num_accepted=each.num_accepted)

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        """See `Proposer.observe`."""
        assert self._proposer is not None
        self._proposer.observe(slot, token_ids, start, hidden)

    def forget(self, slot: int) -> None:
        """The sequence in this slot has ended. Safe to repeat."""
        self._acceptance.pop(slot, None)
        if self._proposer is not None:
            self._proposer.forget(slot)

    def close(self) -> None:
        """Let go of the proposer and its weights; the counts stay."""
        self._proposer = None
