"""Rounding a matrix to int8 or int4, into memory the caller has laid out.

How group size, rounding and scales were chosen, and why the arithmetic is numpy's: docs/decisions/0015-int4.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie45.quantization.packed import INT4_ZERO, Packed, PackedInt4, PackedInt8, empty_packed

Array = NDArray[np.float32]

_BLOCK_VALUES = 1 << 18  # the scratch of a thread is twice as many float32: 2 MiB
_MIN_THREADED_VALUES = 1 << 20
_COPIED_VALUES = 1 << 24  # quantised before they go to another device
_MAX_INT8 = 127
_MIN_SCALE = torch.finfo(torch.float32).tiny  # 1 / scale must be finite
_STRETCHES = (0.95, 1.0, 1.1)
"""What is tried, as multiples of the scale that gives a group's value of largest magnitude the code -8."""


def quantize_into(packed: Packed, weight: Tensor, *, alone: bool = False) -> None:
    """Round `weight` [N, K], bfloat16, float16, float32 or float64 on the CPU, to what `packed` holds, on as many
    threads as torch uses; `alone` on the calling one, where several do so at once: each has memory of its own.

    The result does not depend on how many rows go together, on threads or on the processor. It may be called from
    several threads at once.
    """
    if packed.codes.device.type != "cpu":
        _quantize_and_copy(packed, weight)
        return
    num_rows, num_columns = weight.shape
    step = max(1, min(num_rows, _BLOCK_VALUES // num_columns))
    starts = iter(range(0, num_rows, step))  # shared: each thread takes the next block when it is done with one
    num_threads = torch.get_num_threads() if weight.numel() >= _MIN_THREADED_VALUES and not alone else 1
    if num_threads == 1:
        _quantize_blocks(packed, weight, starts, step)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for task in [pool.submit(_quantize_blocks, packed, weight, starts, step) for _ in range(num_threads)]:
            task.result()


def quantize_blocks_into(packed: PackedInt8, blocks: Iterable[Tensor]) -> None:
    """As `quantize_into`, for a matrix whose rows come some at a time, in order; a block may be overwritten by the
    next."""
    first = 0
    for block in blocks:
        rows = slice(first, first + len(block))
        quantize_into(PackedInt8(codes=packed.codes[rows], scales=packed.scales[rows]), block)
        first = rows.stop


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, K] -> codes int8 [N, K] and scales float32 [N], so that codes · scales is near: each row's largest
    value becomes 127."""
    scales = int8_scales(weight.abs().amax(dim=1))
    return (weight * scales.reciprocal()[:, None]).round_().to(torch.int8), scales


def int8_scales(largest: Tensor) -> Tensor:
    """float32 [N], the largest magnitude of each row -> the scale that makes it 127."""
    return largest.div(_MAX_INT8).clamp_(min=_MIN_SCALE)


def _quantize_and_copy(packed: Packed, weight: Tensor) -> None:
    """As `quantize_into`, for a `packed` on another device than the CPU."""
    num_rows, num_columns = weight.shape
    scheme, group_size = ("int4", packed.group_size) if isinstance(packed, PackedInt4) else ("int8", 0)
    step = max(1, _COPIED_VALUES // num_columns)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        piece = empty_packed(scheme, rows.stop - start, num_columns, group_size, torch.device("cpu"))
        quantize_into(piece, weight[rows])
        for name, tensor in packed.tensors().items():
            tensor[rows].copy_(piece.tensors()[name])


def _quantize_blocks(packed: Packed, weight: Tensor, starts: Iterator[int], step: int) -> None:
    """Round the blocks of `step` rows that begin at `starts`, in this thread."""
    weight = weight.detach()
    source = weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()
    target: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
    scratch = np.empty((2, step * weight.shape[1]), np.float32)
    group_size = packed.group_size if isinstance(packed, PackedInt4) else 0
    with np.errstate(all="ignore"):  # zeros are divided by zero, and a damaged file may hold anything
        for start in starts:
            rows = slice(start, start + step)
            block = source[rows]
            out = {name: array[rows] for name, array in target.items()}
            if group_size:
                groups = block.reshape(-1, group_size).T
                y, q = scratch[:, : block.size].reshape(2, group_size, -1)
                _widen(groups, y)
                _round_int4(y, q, **out)
            else:
                values = scratch[0, : block.size].reshape(block.shape)
                _widen(block, values)
                _round_int8(values, **out)


def _widen(block: NDArray[Any], values: Array) -> None:
    """To float32; uint16 are the bits of bfloat16."""
    if block.dtype == np.uint16:
        bits = values.view(np.uint32)
        np.copyto(bits, block)
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(values, block, casting="same_kind")


def _round_int8(values: Array, codes: NDArray[np.int8], scales: Array) -> None:
    """`values` [n, K] are overwritten."""
    largest = np.maximum(values.max(axis=1), -values.min(axis=1))
    _put_int8_scales(largest, scales)
    np.multiply(values, np.reciprocal(scales)[:, None], out=values)
    np.rint(values, out=values)
    np.copyto(codes, values, casting="unsafe")


def _put_int8_scales(largest: Array, scales: Array) -> None:
    """As `int8_scales`."""
    np.maximum(largest / _MAX_INT8, _MIN_SCALE, out=scales)


def _round_int4(y: Array, q: Array, codes: NDArray[np.uint8], scales: NDArray[np.int8], row_scales: Array) -> None:
    """Symmetric groups with the best of a few scales. A group is a column of `y` [group size, n · G], so that what is
    done to a group is done to whole rows at once; `y` and `q` are overwritten.

    For given codes q, the least-squares scale of values y is <y, q> / <q, q>, and lowers the squared error by
    <y, q>² / <q, q>.
    """
    units = _int4_units(y)
    np.multiply(y, np.reciprocal(units), out=y)
    # Multiples of 2^-10 up to 8: the sums below are then exact, and so the same in any order of adding.
    np.add(y, 1.5 * 2**13, out=y)
    np.subtract(y, 1.5 * 2**13, out=y)
    y_dot_q, q_dot_q = np.empty((2, len(_STRETCHES), len(units)), np.float32)
    for stretch, y_sum, q_sum in zip(_STRETCHES, y_dot_q, q_dot_q, strict=True):
        np.multiply(y, 1 / stretch, out=q)
        np.rint(q, out=q)
        if stretch <= 1:  # else nothing is beyond
            np.clip(q, -8, 7, out=q)
        np.einsum("ij,ij->j", y, q, out=y_sum)
        np.einsum("ij,ij->j", q, q, out=q_sum)
    fits = y_dot_q / np.maximum(q_dot_q, 1)
    gains = y_dot_q * fits
    best = np.where(gains >= gains.max(axis=0), fits, 0).max(axis=0)

    steps = (best * units).reshape(scales.shape)
    _put_int8_scales(np.abs(steps).max(axis=1), row_scales)
    rounded = np.rint(steps / row_scales[:, None])
    np.copyto(scales, rounded, casting="unsafe")
    inverse = units / (rounded * row_scales[:, None]).reshape(-1)
    inverse[rounded.reshape(-1) == 0] = 0
    np.multiply(y, inverse, out=y)
    np.rint(y, out=y)
    np.clip(y, -8, 7, out=y)
    _pack_int4(y, codes)


def _int4_units(groups: Array) -> Array:
    """The scale [G] that gives each group's value of largest magnitude the code -8; `groups` are columns."""
    largest, smallest = groups.max(axis=0), groups.min(axis=0)
    magnitude = np.maximum(np.maximum(largest, -smallest) / 8, _MIN_SCALE)
    units: Array = np.copysign(magnitude, -(largest + smallest))
    return units


def _pack_int4(groups: Array, codes: NDArray[np.uint8]) -> None:
    """Codes -8 to 7, a column for each group, to bytes [n, K/2] in the order of `PackedInt4.codes`."""
    low, high = groups.reshape(2, -1, groups.shape[1])
    np.multiply(high, 16, out=high)
    np.add(low, high, out=low)
    np.add(low, INT4_ZERO * 17, out=low)
    packed = low.astype(np.uint8)
    np.copyto(codes.reshape(len(codes), -1, len(low)), packed.reshape(len(low), len(codes), -1).transpose(1, 2, 0))
