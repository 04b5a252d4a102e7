"""Quantised matrices as they are stored, the same on every processor. The format is described in docs/packed-format.md.

Shape letters: N rows (outputs), K columns (inputs), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

INT4_ZERO = 8
"""The 4-bit code that stands for 0 where a matrix has no `zeros` of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedInt8:
    """w[n, k] = codes[n, k] · scales[n]; codes int8 [N, K] from -127, scales float32 [N]."""

    codes: Tensor
    scales: Tensor

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the name each has in files."""
        return {"codes": self.codes, "scales": self.scales}

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights float32 [stop - start, K] of some rows."""
        return self.codes[start:stop].float() * self.scales[start:stop, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedInt4:
    """w[n, k] = (code[n, k] - zeros[n, g]) · scales[n, g] · row_scales[n], with g = k // (K / G).

    `codes` uint8 [N, K/2] holds two 4-bit codes in a byte: byte j of a group has column j of the group in its low half,
    column j + K/G/2 in its high half. `scales` [N, G] are int8 with `row_scales` float32 [N] (our own), or a floating
    dtype without (GPTQ's). `zeros` uint8 [N, G], None for 8 everywhere. With `input_order` int32 [K], column k of all
    this multiplies input number input_order[k].
    """

    codes: Tensor
    scales: Tensor
    row_scales: Tensor | None = None
    zeros: Tensor | None = None
    input_order: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return 2 * self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features // self.scales.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the name each has in files."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "row_scales": self.row_scales,
            "zeros": self.zeros,
            "input_order": self.input_order,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, start: int, stop: int) -> Tensor:
        """Weights float32 [stop - start, K] of some rows, in the order of the inputs."""
        codes = unpack_int4(self.codes[start:stop], self.group_size).view(stop - start, -1, self.group_size).float()
        codes -= INT4_ZERO if self.zeros is None else self.zeros[start:stop, :, None].float()
        values = (codes * self.scales[start:stop, :, None].float()).flatten(1)
        if self.row_scales is not None:
            values *= self.row_scales[start:stop, None]
        if self.input_order is None:
            return values
        ordered = torch.empty_like(values)
        ordered[:, self.input_order.long()] = values
        return ordered


Packed = PackedInt8 | PackedInt4


def num_bytes(packed: Packed) -> int:
    """Bytes of all its tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())


def dequantize(packed: Packed) -> Tensor:
    """The whole matrix, float32 [N, K]."""
    return packed.rows(0, packed.out_features)


def pack_int4(codes: Tensor, group_size: int) -> Tensor:
    """4-bit codes uint8 [N, K], one in a byte -> [N, K/2], two in a byte, in the order of `PackedInt4.codes`."""
    low, high = codes.view(codes.shape[0], -1, 2, group_size // 2).unbind(2)
    return torch.add(low, high, alpha=16).flatten(1)


def unpack_int4(packed: Tensor, group_size: int) -> Tensor:
    """The inverse: [N, K/2] -> 4-bit codes uint8 [N, K], one in a byte."""
    halves = packed.view(packed.shape[0], -1, 1, group_size // 2)
    return torch.cat((halves & 15, halves >> 4), dim=2).flatten(1)


class Take(Protocol):
    """Takes memory for an uninitialised tensor."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


def empty_packed(
    scheme: str,
    out_features: int,
    in_features: int,
    group_size: int,
    device: torch.device,
    take_codes: Take | None = None,
) -> Packed:
    """Room for one of our own packed matrices, "int8" or "int4"; that for its codes comes from `take_codes`."""
    take = take_codes or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
    scales = torch.empty(out_features, dtype=torch.float32, device=device)
    if scheme == "int8":
        return PackedInt8(codes=take((out_features, in_features), torch.int8), scales=scales)
    return PackedInt4(
        codes=take((out_features, in_features // 2), torch.uint8),
        scales=torch.empty((out_features, in_features // group_size), dtype=torch.int8, device=device),
        row_scales=scales,
    )
