"""Keys and values of earlier tokens, in the dtype of the arithmetic or in int8.

A slot is made of blocks of 32 tokens. Layers on the native kernels order the numbers of a block in a way of their own
(`E45KV` in csrc/ernie45.h): what they write, only they can read.

Shape letters: N tokens of a step, S tokens of a sequence so far, Hkv key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ernie45.memory.budget import KV_BLOCK_TOKENS, KVDtype, slot_tokens
from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement

_MAX_CODE = 127
# Half the bytes of float32 and all of its range. Its few digits cost nothing: codes are made with the rounded scale,
# which takes the largest value to 127.25 at most.
_SCALE_DTYPE = torch.bfloat16
_MIN_SCALE = torch.finfo(_SCALE_DTYPE).tiny


class KVStore(Protocol):
    """The keys, or the values, of one layer in every slot."""

    def write(self, slots: Tensor, positions: Tensor, x: Tensor) -> None:
        """Put x [N, Hkv, D] at `positions` of `slots`, int64 [N]."""
        ...

    def read(self, slot: int, end: int) -> Tensor:
        """What was written at positions 0 … end - 1 -> [Hkv, end, D]"""
        ...

    def copy(self, from_slot: int, to_slot: int, start: int, end: int) -> None:
        """Put what was written at positions start … end - 1 of one slot into another, bit by bit."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseStore:
    """`x` [slots, Hkv, context, D], of which reading gives views."""

    x: Tensor

    def write(self, slots: Tensor, positions: Tensor, x: Tensor) -> None:
        self.x[slots, :, positions] = x

    def read(self, slot: int, end: int) -> Tensor:
        return self.x[slot, :, :end]

    def copy(self, from_slot: int, to_slot: int, start: int, end: int) -> None:
        self.x[to_slot, :, start:end] = self.x[from_slot, :, start:end]


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Store:
    """x = codes · scales, rounded by each token and head on its own when it is written; `codes` int8
    [slots, Hkv, context, D], `scales` [slots, Hkv, context], x of `dtype`."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def write(self, slots: Tensor, positions: Tensor, x: Tensor) -> None:
        wide = x.float()
        scales = wide.abs().amax(dim=-1).div_(_MAX_CODE).clamp_(min=_MIN_SCALE).to(_SCALE_DTYPE)
        self.codes[slots, :, positions] = wide.div(scales[..., None]).round_().to(torch.int8)
        self.scales[slots, :, positions] = scales

    def read(self, slot: int, end: int) -> Tensor:
        return self.codes[slot, :, :end].to(self.dtype).mul_(self.scales[slot, :, :end, None])

    def copy(self, from_slot: int, to_slot: int, start: int, end: int) -> None:
        self.codes[to_slot, :, start:end] = self.codes[from_slot, :, start:end]
        self.scales[to_slot, :, start:end] = self.scales[from_slot, :, start:end]


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCache:
    """Keys and values of every slot, each layer's on the device of its attention. The engine owns it, lending slots."""

    keys: tuple[KVStore, ...]
    values: tuple[KVStore, ...]

    @staticmethod
    def allocate(
        spec: ModelSpec,
        *,
        num_slots: int,
        context_tokens: int,
        dtype: torch.dtype,
        kv_dtype: KVDtype,
        placement: Placement,
    ) -> KVCache:
        """Room for `num_slots` sequences of `context_tokens` tokens, read in `dtype`."""
        shape = (num_slots, spec.num_kv_heads, slot_tokens(context_tokens), spec.head_dim)
        stores = [
            tuple(_allocate_store(shape, dtype, kv_dtype, torch.device(device)) for device in placement.layers)
            for _ in range(2)
        ]
        return KVCache(keys=stores[0], values=stores[1])

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values [N, Hkv, D] of new tokens at `positions` of `slots`, int64 [N]."""
        self.keys[layer].write(slots, positions, keys)
        self.values[layer].write(slots, positions, values)

    def read(self, layer: int, slot: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, end, D] of the first `end` tokens in a slot."""
        return self.keys[layer].read(slot, end), self.values[layer].read(slot, end)

    def copy_prefix(self, from_slot: int, to_slot: int, num_tokens: int, *, start: int = 0) -> None:
        """Have the keys and values of tokens start … num_tokens - 1 of one slot in another as well, in every layer.

        Whole blocks are copied: the tokens before `start` are to be the same bits in both slots, and what the other
        slot held from `num_tokens` on is lost. So it is in a `SlotPool`: the other slot's sequence begins with the same
        `num_tokens` tokens, and its next ones are written before they are read.
        """
        first, end = start // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS, slot_tokens(num_tokens)
        for store in (*self.keys, *self.values):
            store.copy(from_slot, to_slot, first, end)


def _allocate_store(
    shape: tuple[int, int, int, int], dtype: torch.dtype, kv_dtype: KVDtype, device: torch.device
) -> KVStore:
    # empty, not zeros: on a CPU the pages of unused slots then never become resident.
    if kv_dtype == "auto":
        return DenseStore(x=torch.empty(shape, dtype=dtype, device=device))
    return Int8Store(
        codes=torch.empty(shape, dtype=torch.int8, device=device),
        scales=torch.empty(shape[:-1], dtype=_SCALE_DTYPE, device=device),
        dtype=dtype,
    )
