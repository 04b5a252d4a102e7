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
    another request left, it does without. Its positions count from there.
    """

    max_tokens = 1
    wants_hidden = True

    def __init__(self, head: PredictionHead, cache: KVCache) -> None:
        self._head = head
        self._cache = cache
        self._rows: dict[int, _Row] = {}

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
        row = self._rows.get(slot)
        if row is None or row.end != start:
            row = self._rows[slot] = _Row(first=start, end=start)
        row.waiting.append(hidden.to(self._head.device))
        row.end += len(hidden)
        if row.end - row.first - row.num_cached >= PREFILL_CHUNK_TOKENS:
            self._catch_up(slot, token_ids)

    def forget(self, slot: int) -> None:
        self._rows.pop(slot, None)

    def _catch_up(self, slot: int, token_ids: Sequence[int]) -> None:
        """Run what waits, but for a state whose next token is not known yet."""
        row = self._rows[slot]
        hidden = torch.cat(row.waiting)
        known = min(len(hidden), len(token_ids) - 1 - row.first - row.num_cached)
        following = token_ids[row.first + row.num_cached + 1 :][:known]
        run = Run(slot=slot, start=row.num_cached, token_ids=following, wanted=())
        self._head(text_batch([run], self._cache, self._head.device), hidden[:known])
        row.num_cached += known
        row.waiting = [hidden[known:].clone()]  # not a view that keeps a whole chunk

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
    the rest is `waiting`."""

    first: int
    end: int
    num_cached: int = 0
    waiting: list[Tensor] = field(default_factory=list)
