"""Products with matrices that stay quantised, "int8" and "int4".

A row's result does not depend on the rows beside it: integer sums are exact, and the 4-bit kernel sums every row in the
same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.int4_order import kernel_codes
from ernie45.kernels.linear import Linear, bias_bytes
from ernie45.kernels.panels import PanelMemory, packed_panels, takes_panels
from ernie45.quantization.packed import INT4_ZERO, Packed, PackedInt4, PackedInt8, num_bytes
from ernie45.quantization.panels import PanelInt4, StoredMatrix, in_rows
from ernie45.quantization.quantize import int8_scales

_KERNEL_GROUPS = (256, 128, 64, 32)  # group sizes of torch's 4-bit kernel
_KERNEL_ROWS = 16  # what it wants the outputs to be a multiple of
_BLOCK_VALUES = 1 << 20  # unpacked at a time
_SCALED_VALUES = 1 << 19  # outputs that are scaled at a time


def build_packed_linear(
    packed: StoredMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    memory: PanelMemory | None = None,
    *,
    in_place: bool = False,
    is_staged: bool = False,
) -> Linear:
    """The fastest product for a quantised matrix on the device it lies on; x and y are of `dtype`.

    With `in_place` the memory of its codes may be written to, and nothing of its size is allocated: loading leaves no
    holes in the heap then. Where the native kernels serve, it must come from `memory`. With `is_staged` the matrix is
    overwritten by the next, and what is kept of it is copied.
    """
    device = next(iter(packed.tensors().values())).device
    if takes_panels(dtype, device, packed.in_features):
        panels = packed_panels(packed, bias, memory or PanelMemory(), in_place=in_place)
        if panels is not None:
            return panels
    if isinstance(packed, PanelInt4):
        packed, in_place = in_rows(packed), True
    elif is_staged:
        packed = type(packed)(**{name: tensor.clone() for name, tensor in packed.tensors().items()})
    on_cpu = device.type == "cpu"
    if on_cpu and isinstance(packed, PackedInt8):
        return Int8Linear(packed, bias, dtype)
    if on_cpu and isinstance(packed, PackedInt4) and kernel_group(packed) is not None:
        return Int4Linear(packed, bias, in_place=in_place)
    return UnpackingLinear(packed, bias)


class Int8Linear:
    """Rows of x are rounded to int8 by their own largest value; products are summed as integers."""

    __slots__ = ("bias", "dtype", "packed")

    def __init__(self, packed: PackedInt8, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.packed, self.bias, self.dtype = packed, bias, dtype

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def code_bytes(self) -> int:
        return self.packed.codes.numel() + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        return 4 * self.packed.scales.numel()

    def __call__(self, x: Tensor) -> Tensor:
        codes, scales = _rounded_rows(x)
        y = torch.empty((x.shape[0], self.out_features), dtype=self.dtype, device=x.device)
        # The sums take 8 bytes a number: some outputs at a time.
        step = max(_SCALED_VALUES // max(x.shape[0], 1) // _KERNEL_ROWS, 1) * _KERNEL_ROWS
        for first in range(0, self.out_features, step):
            outputs = slice(first, first + step)
            part = torch._int_mm(codes, self.packed.codes[outputs].t()).float()
            part.mul_(scales[:, None]).mul_(self.packed.scales[outputs])
            if self.bias is not None:
                part += self.bias[outputs]
            y[:, outputs] = part
        return y


class Int4Linear:
    """torch's 4-bit kernel for CPUs. Codes are kept in the order that the kernel has on this processor."""

    __slots__ = ("_group_size", "_input_order", "_row_scales", "_scales", "_zeros", "bias", "codes", "out_features")

    def __init__(self, packed: PackedInt4, bias: Tensor | None, *, in_place: bool = False) -> None:
        group_size = kernel_group(packed)
        assert group_size is not None
        self.out_features = packed.out_features
        self.bias = bias
        self.codes = kernel_codes(packed, packed.codes if in_place else torch.empty_like(packed.codes))
        self._group_size = group_size
        # One byte for each group is kept and made into the kernel's table when it is used, in an eighth of its time;
        # the table itself would take a quarter of the codes' memory.
        self._scales = packed.scales.t().contiguous()
        self._zeros = None if packed.zeros is None else packed.zeros.t().contiguous()
        self._row_scales = packed.row_scales
        self._input_order = packed.input_order

    @property
    def code_bytes(self) -> int:
        return self.codes.numel() + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        kept = (self._scales, self._zeros, self._row_scales, self._input_order)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if self._input_order is not None:
            x = x[:, self._input_order]
        # Codes times scales are summed before the row scales are multiplied in: more than float16 can hold.
        rows = x.float() if x.dtype == torch.float16 else x.contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self._group_size, self._table(rows))
        if self._row_scales is not None:
            # torch makes float32 copies of both sides of such a product: some rows at a time.
            for part in y.split(max(1, _SCALED_VALUES // self.out_features)):
                part.mul_(self._row_scales)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def _table(self, x: Tensor) -> Tensor:
        """Scales and offsets [G, N, 2] as the kernel wants them: w = (code - 8) · scale + offset."""
        if self._zeros is None and self._scales.dtype == torch.int8 and x.dtype == torch.bfloat16:
            return _bfloat16_pairs(self._scales)
        scales = self._scales.float()
        offsets = torch.zeros_like(scales) if self._zeros is None else (INT4_ZERO - self._zeros.float()) * scales
        pairs = torch.stack((scales, offsets), dim=2).to(x.dtype)
        return pairs.repeat_interleave(x.shape[1] // len(pairs) // self._group_size, dim=0)


class UnpackingLinear:
    """Unpacks some rows at a time and multiplies with them: for devices and shapes that nothing faster serves."""

    __slots__ = ("bias", "packed")

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        self.packed, self.bias = packed, bias

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def code_bytes(self) -> int:
        return self.packed.codes.numel() + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        return num_bytes(self.packed) - self.packed.codes.numel()

    def __call__(self, x: Tensor) -> Tensor:
        step = max(1, _BLOCK_VALUES // self.packed.in_features)
        starts = range(0, self.out_features, step)
        ends = [min(start + step, self.out_features) for start in starts]
        y = torch.cat(
            [F.linear(x, self.packed.rows(*rows).to(x.dtype)) for rows in zip(starts, ends, strict=True)], dim=1
        )
        return y if self.bias is None else y + self.bias


class StackedLinear:
    """Matrices over the same inputs whose outputs follow one another, where they cannot be joined into one."""

    __slots__ = ("bias", "parts")

    def __init__(self, parts: Sequence[Linear], bias: Tensor | None) -> None:
        self.parts, self.bias = parts, bias

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    @property
    def code_bytes(self) -> int:
        return sum(part.code_bytes for part in self.parts) + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        return sum(part.scale_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=1)
        return y if self.bias is None else y + self.bias


class PackedEmbedding:
    """An int8 table that is looked up by row."""

    __slots__ = ("dtype", "packed")

    def __init__(self, packed: PackedInt8, dtype: torch.dtype) -> None:
        self.packed, self.dtype = packed, dtype

    def lookup(self, ids: Tensor) -> Tensor:
        return (self.packed.codes[ids].float() * self.packed.scales[ids, None]).to(self.dtype)


def kernel_group(packed: PackedInt4) -> int | None:
    """The group size that torch's kernel is called with: the matrix's own, or a part of it; None if it cannot serve."""
    if packed.out_features % _KERNEL_ROWS:
        return None
    return next((size for size in _KERNEL_GROUPS if packed.group_size % size == 0), None)


def _rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `round_int8` gives for x [N, K] of any floating dtype, with a single float32 copy of it."""
    scales = int8_scales(torch.maximum(x.amax(dim=1), -x.amin(dim=1)).float())
    wide = x.to(torch.float32, copy=True)
    return wide.mul_(scales.reciprocal()[:, None]).round_().to(torch.int8), scales


def _bfloat16_pairs(scales: Tensor) -> Tensor:
    """int8 [G, N] -> bfloat16 [G, N, 2], pairs of a scale and 0."""
    # A small integer as float32 is its bfloat16 after 16 bits of zeros: written in one pass and read from one half
    # later on, that makes the pairs.
    wide = torch.empty(scales.numel() + 1, dtype=torch.float32)
    wide[:-1] = scales.view(-1)
    wide[-1] = 0
    return wide.view(torch.bfloat16)[1:-1].view(*scales.shape, 2)
