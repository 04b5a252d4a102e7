"""Runs of tokens put together as the batch of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ernie45.backends.base import Batch, Row
from ernie45.backends.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """New tokens of one sequence, at positions `start` … of the KV slot `slot`. `wanted` says after which of them
    logits are, the first being 0."""

    slot: int
    start: int
    token_ids: Sequence[int]
    wanted: Sequence[int]


def text_batch(runs: Sequence[Run], cache: KVCache, device: torch.device) -> Batch:
    """The runs one after the other, on `device`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    for run in runs:
        num_tokens = len(run.token_ids)
        wanted += [len(token_ids) + place for place in run.wanted]
        token_ids += run.token_ids
        positions += range(run.start, run.start + num_tokens)
        slots += [run.slot] * num_tokens
    columns = [
        torch.tensor(values, dtype=torch.int64, device=device) for values in (token_ids, positions, slots, wanted)
    ]
    return Batch(
        rows=tuple(Row(slot=run.slot, start=run.start, num_tokens=len(run.token_ids)) for run in runs),
        token_ids=columns[0],
        positions=columns[1],
        slots=columns[2],
        wanted=columns[3],
        cache=cache,
    )
