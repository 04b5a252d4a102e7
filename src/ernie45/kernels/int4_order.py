"""Putting 4-bit codes into the order of torch's kernel for CPUs, which differs between processors.

The work is numpy's, on threads of our own: see docs/decisions/0015-int4.md.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie45.quantization.packed import PackedInt4, unpack_int4

Bytes = NDArray[np.uint8]

_BLOCK_BYTES = 1 << 18  # reordered at a time: these and what is made of them stay in the cache
_MIN_THREADED_BYTES = 1 << 20
_ORDERED_ROWS = 256  # a multiple of the rows that any processor's order goes by
_PROBED_COLUMNS = 64


def kernel_codes(packed: PackedInt4, codes: Tensor) -> Tensor:
    """Put the codes into `codes` uint8 [N, K/2] in the kernel's order: for each block of rows column by column, two
    rows in a byte. `codes` may be the matrix's own, for a block of rows stays where it is."""
    order = _kernel_order()
    num_whole = 0 if order is None else packed.out_features // order.block_rows * order.block_rows
    if order is not None:
        step = max(1, _BLOCK_BYTES // (order.block_rows * codes.shape[1])) * order.block_rows
        blocks = [slice(start, min(start + step, num_whole)) for start in range(0, num_whole, step)]
        num_threads = torch.get_num_threads() if codes.numel() >= _MIN_THREADED_BYTES else 1
        given, ordered, half_group = packed.codes.numpy(), codes.numpy(), packed.group_size // 2
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(lambda rows: order.put(given[rows], ordered[rows], half_group), blocks):
                pass
    for start in range(num_whole, packed.out_features, _ORDERED_ROWS):
        rows = slice(start, start + _ORDERED_ROWS)
        codes[rows] = _ordered(unpack_int4(packed.codes[rows], packed.group_size)).view(codes[rows].shape)
    # An operator of torch views its weight as [N, K/2], however its blocks lie inside.
    return codes


@dataclass(frozen=True, kw_only=True, slots=True)
class _KernelOrder:
    """How many rows make a block, and which of them have the `low` and the `high` halves of a column's bytes."""

    block_rows: int
    low: NDArray[np.int64]
    high: NDArray[np.int64]

    def put(self, given: Bytes, out: Bytes, half_group: int) -> None:
        """Codes of whole blocks of rows [n, K/2], in the order of `PackedInt4.codes` -> `out`, in this order."""
        blocks = given.reshape(-1, self.block_rows, given.shape[1])
        one, other = blocks[:, self.low], blocks[:, self.high]  # [blocks, block_rows / 2, K / 2]
        halves = np.empty((len(blocks), 2, len(self.low), given.shape[1]), dtype=np.uint8)
        np.bitwise_or(one & 15, other << 4, out=halves[:, 0])
        np.bitwise_or(one >> 4, other & 240, out=halves[:, 1])
        groups = halves.reshape(len(blocks), 2, len(self.low), -1, half_group).transpose(0, 3, 1, 4, 2)
        out.reshape(groups.shape)[...] = groups


@cache
def _kernel_order() -> _KernelOrder | None:
    """The order, asked of the function that makes it, which takes three times as long for a whole matrix; None where
    it is not known here."""
    for block_rows in (64, 32):
        rows = torch.arange(block_rows, dtype=torch.uint8)[:, None].expand(-1, _PROBED_COLUMNS)
        units, sixteens = _ordered(rows & 15), _ordered(rows >> 4)
        low = ((units & 15) | (sixteens << 4)).view(_PROBED_COLUMNS, -1)
        high = ((units >> 4) | (sixteens & 240)).view(_PROBED_COLUMNS, -1)
        if (low == low[0]).all() and (high == high[0]).all():
            return _KernelOrder(block_rows=block_rows, low=low[0].long().numpy(), high=high[0].long().numpy())
    return None


def _ordered(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [N, K], one in a byte, in the order of torch's kernel; flat, two in a byte."""
    ordered: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return ordered.flatten()
