"""The seam between the engine and a model: `Backend.forward(batch) -> Step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ernie45.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of every slot, a tensor [slots, Hkv, context, D] per layer. The engine owns it, lending slots."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @staticmethod
    def allocate(
        spec: ModelSpec, *, num_slots: int, context_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        # empty, not zeros: on a CPU the pages of unused slots then never become resident.
        shape = (num_slots, spec.num_kv_heads, context_tokens, spec.head_dim)
        keys = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers))
        values = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.num_layers))
        return KVCache(keys=keys, values=values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A run of `num_tokens` new tokens of one sequence, at positions `start` …, whose earlier keys lie in `slot`."""

    slot: int
    start: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's work: the rows' tokens one after the other.

    `token_ids`, `positions` and `slots` are int64 [N], one entry a token. `wanted` [M] says at which of the N tokens
    logits are needed. `rotary_positions` int64 [N, 3] (time, height, width) are what the rotary embedding turns by,
    None where that is `positions`; `vision` is None where all tokens are text.
    """

    rows: tuple[Row, ...]
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor
    cache: KVCache
    rotary_positions: Tensor | None = None
    vision: VisionTokens | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTokens:
    """Which of a batch's tokens belong to pictures or clips.

    `text` and `routed` int64 say at which of the N tokens the text's and the pictures' experts work; start and end
    markers are with the pictures. `embedded` [F] are the places of placeholders, which `features` [F, h] embed.
    """

    text: Tensor
    routed: Tensor
    embedded: Tensor
    features: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step gives: `logits` float32 [M, V], one row for each wanted token."""

    logits: Tensor


class Backend(Protocol):
    """A model's weights and its forward step. The engine calls it from one thread only."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: Batch) -> Step: ...


@runtime_checkable
class MediaBackend(Backend, Protocol):
    """A backend that sees: its `spec.vision` is not None."""

    def encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [P, values] of a picture, or of some frames of a clip (an even number), as `Media` holds them, with
        their frames, rows and columns -> features [tokens, h], on the backend's device and in its dtype."""
        ...
