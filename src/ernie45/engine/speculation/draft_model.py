"""A small model that runs ahead of the large one (Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding"; here its guesses are drawn with the numbers that will draw the tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from ernie45.backends.base import Backend
from ernie45.backends.kv_cache import KVCache
from ernie45.engine.batches import Run, text_batch
from ernie45.engine.speculation.proposer import Ask
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS

MAX_TOKENS = 8
# A draft lacks the token that was drawn last and, where all guesses were right, the last of these.
_LACKS = 2


@final
class DraftModel:
    """Guesses with `backend`, whose `cache` has as many slots as the engine's, of `context_tokens` tokens.

    A prompt is read in chunks of 512 tokens, one each turn, while its sequence decodes without guesses; what the slot
    still holds of an earlier sequence that began the same is not read again.
    """

    max_tokens = MAX_TOKENS
    wants_hidden = False

    def __init__(self, backend: Backend, cache: KVCache, *, context_tokens: int) -> None:
        self._backend = backend
        self._cache = cache
        self._context_tokens = context_tokens
        self._rows: dict[int, _Row] = {}

    def read(self, asks: Sequence[Ask]) -> None:
        behind = [(ask, missing[:-1]) for ask in asks if len(missing := self._missing(ask)) > _LACKS]
        budget = PREFILL_CHUNK_TOKENS
        parts = []
        for ask, token_ids in sorted(behind, key=lambda part: len(part[1])):
            if budget:
                parts.append((ask, token_ids[:budget]))
                budget -= len(token_ids[:budget])
        if parts:
            self._run(parts, is_wanted=False)

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        proposals: list[list[int]] = [[] for _ in asks]
        missing = [self._missing(ask) for ask in asks]
        ready = [place for place, token_ids in enumerate(missing) if 0 < len(token_ids) <= _LACKS]
        runs = [(asks[place], missing[place]) for place in ready]
        while runs:
            logits = self._run(runs, is_wanted=True)
            for place, row_logits in zip(ready, logits, strict=True):
                proposals[place].append(asks[place].sampler.guess(row_logits, len(proposals[place])))
            ready = [place for place in ready if len(proposals[place]) < asks[place].most]
            runs = [(asks[place], proposals[place][-1:]) for place in ready]
        return proposals

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        """Not needed: the draft reads the ids itself."""

    def forget(self, slot: int) -> None:
        if slot in self._rows:
            self._rows[slot].num_agreed = 0

    def _missing(self, ask: Ask) -> Sequence[int]:
        """Have the slot hold nothing but tokens of the sequence -> those after them, the last at least, whose logits
        are wanted; none where the context has no room for guesses."""
        if len(ask.token_ids) + ask.most > self._context_tokens:
            return []
        row = self._rows.setdefault(ask.slot, _Row())
        most = min(len(row.ids), len(ask.token_ids) - 1)
        agreed = row.num_agreed
        while agreed < most and row.ids[agreed] == ask.token_ids[agreed]:
            agreed += 1
        del row.ids[agreed:]
        row.num_agreed = agreed
        return ask.token_ids[agreed:]

    def _run(self, parts: Sequence[tuple[Ask, Sequence[int]]], *, is_wanted: bool) -> Tensor:
        """Run tokens of these sequences after what their slots hold -> logits [B, V] after the last of each"""
        rows = [self._rows[ask.slot] for ask, _ in parts]
        runs = [
            Run(
                slot=ask.slot,
                start=len(row.ids),
                token_ids=token_ids,
                wanted=(len(token_ids) - 1,) if is_wanted else (),
            )
            for (ask, token_ids), row in zip(parts, rows, strict=True)
        ]
        step = self._backend.forward(text_batch(runs, self._cache, self._backend.device))
        for run, row in zip(runs, rows, strict=True):
            row.ids += run.token_ids
        return step.logits


class _Row:
    """The tokens in a slot, and how many of them are known to be the sequence's."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.num_agreed = 0
