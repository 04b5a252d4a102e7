"""The checkpoint's own head for multi-token prediction, which reads the model's states and guesses one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor

from ernie45.backends.base import Batch
from ernie45.backends.kv_cache import KVCache
from ernie45.engine.batches import Run, text_batch
from ernie45.engine.speculation.proposer import Ask
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS

# States of a sequence that a step leaves, where its guess was right.
_AFTER_A_STEP = 2


class PredictionHead(Protocol):
    """`ernie45.backends.mtp.MtpHead`."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The tokens that come next, and states [N, h] of the model at those before them -> logits float32 [M, V]"""
        ...


@final
class MtpProposer:
    """Guesses the token after the one that was drawn last. `cache` has one layer and the engine's slots.

    The head is given a sequence from the first token on whose state is seen; what came before, such as a prefix that
    another request left, it does without. Its positions count from there. It runs when a guess is asked for; before
    more states wait than a chunk has tokens, over all sequences, it is run on these.
    """

    max_tokens = 1
    wants_hidden = True

    def __init__(self, head: PredictionHead, cache: KVCache) -> None:
        self._head = head
        self._cache = cache
        self._rows: dict[int, _Row] = {}

    def read(self, asks: Sequence[Ask]) -> None:
        if any(self._rows[ask.slot].num_waiting > _AFTER_A_STEP for ask in asks if ask.slot in self._rows):
            self._catch_up()

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in asks]
        ready = [
            place
            for place, ask in enumerate(asks)
            if ask.slot in self._rows and self._rows[ask.slot].end == len(ask.token_ids) - 1
        ]
        if ready:
            logits = self._run([asks[place] for place in ready])
            for place, row_logits in zip(ready, logits, strict=True):
                proposals[place].append(asks[place].sampler.guess(row_logits, 0))
        return proposals

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        if sum(row.num_waiting for row in self._rows.values()) + len(hidden) > PREFILL_CHUNK_TOKENS:
            self._catch_up()
        row = self._rows.get(slot)
        if row is None or row.end != start:
            row = self._rows[slot] = _Row(first=start, end=start)
        row.token_ids = token_ids
        row.waiting.append(hidden.to(self._head.device, copy=True))  # no view, which would keep those of other rows
        row.end += len(hidden)

    def forget(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def _catch_up(self) -> None:
        """Run what waits, but for the last state of each sequence: guesses come from there, or its next token is not
        known yet."""
        runs, states = [], []
        for slot, row in self._rows.items():
            following = row.token_ids[row.first + row.num_cached + 1 : row.end]
            if following:
                hidden = torch.cat(row.waiting)
                runs.append(Run(slot=slot, start=row.num_cached, token_ids=following, wanted=()))
                states.append(hidden[: len(following)])
                row.num_cached += len(following)
                row.waiting = [hidden[len(following) :].clone()]
        if runs:
            self._head(text_batch(runs, self._cache, self._head.device), torch.cat(states))

    def _run(self, asks: Sequence[Ask]) -> Tensor:
        """Run all that waits of these sequences -> logits [B, V] after their last tokens"""
        rows = [self._rows[ask.slot] for ask in asks]
        runs = []
        for ask, row in zip(asks, rows, strict=True):
            following = ask.token_ids[row.first + row.num_cached + 1 :]
            runs.append(Run(slot=ask.slot, start=row.num_cached, token_ids=following, wanted=(len(following) - 1,)))
        hidden = torch.cat([states for row in rows for states in row.waiting])
        logits = self._head(text_batch(runs, self._cache, self._head.device), hidden)
        for row, run in zip(rows, runs, strict=True):
            row.num_cached += len(run.token_ids)
            row.waiting = []
        return logits


@dataclass(slots=True)
class _Row:
    """A sequence of which states were seen from position `first` to before `end`: `num_cached` of them lie in the slot,
    the rest is `waiting`. `token_ids` are its prompt and reply when a state was seen last, or later."""

    first: int
    end: int
    num_cached: int = 0
    token_ids: Sequence[int] = ()
    waiting: list[Tensor] = field(default_factory=list)

    @property
    def num_waiting(self) -> int:
        return self.end - self.first - self.num_cached
