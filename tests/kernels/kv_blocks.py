"""Keys and values in the order in which `E45KV` (csrc/ernie45.h) has the numbers of each block of 32 tokens, and back:
tensors [..., T, D] of whole blocks, whose shape stays."""

from __future__ import annotations

from torch import Tensor, float32

BLOCK_TOKENS = 32


def keys_in_blocks(x: Tensor) -> Tensor:
    blocks = x.unflatten(-2, (-1, BLOCK_TOKENS)).unflatten(-1, (-1, _num_paired(x)))
    ordered: Tensor = blocks.transpose(-3, -2).reshape(x.shape)
    return ordered


def keys_from_blocks(x: Tensor) -> Tensor:
    blocks = x.unflatten(-2, (-1, BLOCK_TOKENS)).flatten(-2).unflatten(-1, (-1, BLOCK_TOKENS, _num_paired(x)))
    ordered: Tensor = blocks.transpose(-3, -2).reshape(x.shape)
    return ordered


def values_in_blocks(x: Tensor) -> Tensor:
    ordered: Tensor = x.unflatten(-2, (-1, _num_paired(x))).transpose(-2, -1).reshape(x.shape)
    return ordered


def values_from_blocks(x: Tensor) -> Tensor:
    rows = x.unflatten(-2, (-1, _num_paired(x))).flatten(-2).unflatten(-1, (-1, _num_paired(x)))
    ordered: Tensor = rows.transpose(-2, -1).reshape(x.shape)
    return ordered


def _num_paired(x: Tensor) -> int:
    return 1 if x.dtype == float32 else 2
