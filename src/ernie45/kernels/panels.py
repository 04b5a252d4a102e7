"""Matrices that the native kernels multiply with, in bfloat16, int8 or int4: in panels of 64 outputs."""

from __future__ import annotations

import copy
import math
from typing import final

import torch
from torch import Tensor

from ernie45.checkpoint.large_pages import map_large_pages
from ernie45.kernels.linear import bias_bytes
from ernie45.kernels.native import NATIVE_DTYPES, MatrixStruct, kernels
from ernie45.presets import INT4_GROUP
from ernie45.quantization.packed import PackedInt8
from ernie45.quantization.panels import PANEL_ROWS, PanelInt4, StoredMatrix, pad_rows, panel_shape

_COLUMNS = 32  # the kernels want multiples of it
_MOST_COLUMNS = 1 << 16  # rows lie on the stack
_INT8_FLIP = 0x80  # codes lie there with 128 added
_DENSE, _INT8, _INT4 = range(3)
_CODE_BITS = (16, 8, 4)
_PIECE_BYTES = 64 * 2**20
_LINE_BYTES = 64


@final
class PanelMemory:
    """Memory for weights, mapped in large pieces for which the system is asked to use large pages; or that of `room`
    [bytes], beside which matrices lie on the heap whose rows were padded to whole panels in no plan. What lies in the
    room already stays where it is.

    All weights are read in every step, which takes a quarter longer with pages of 4 KiB
    (docs/decisions/0020-native-kernels.md). A piece is given back once no tensor lies in it.
    """

    def __init__(self, room: Tensor | None = None) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8) if room is None else room
        self._room = room

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._rest):
            if self._room is not None:
                return torch.empty(shape, dtype=dtype)
            piece = map_large_pages(max(_PIECE_BYTES, num_bytes), "for weights")
            self._rest = torch.frombuffer(piece, dtype=torch.uint8)
        taken = self._rest[:num_bytes]
        self._rest = self._rest[-(-num_bytes // _LINE_BYTES) * _LINE_BYTES :]
        return taken.view(dtype).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """The same tensor, here."""
        if self._room is not None and 0 <= x.data_ptr() - self._room.data_ptr() < self._room.nbytes:
            return x
        return self.take(tuple(x.shape), x.dtype).copy_(x)


@final
class Staging:
    """One buffer that is used over and over, in place of a fresh one each time, which would leave holes in the heap, a
    tenth of the model in all where weights are read. It lies outside the heap, which would keep it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, until the next call."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._buffer) < num_bytes:
            self._buffer = PanelMemory().take((num_bytes,), torch.uint8)
        return self._buffer[:num_bytes].view(dtype).view(shape)


@final
class PanelLinear:
    """A matrix in panels. A row of x gives the same bits whatever stands beside it."""

    __slots__ = ("_bias", "_kept", "_scale_bytes", "code_bytes", "struct")

    def __init__(
        self,
        kind: int,
        panels: Tensor,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        row_scales: Tensor | None = None,
    ) -> None:
        """`panels` are the padded rows, in panels."""
        self._bias = None if bias is None else bias.float()
        self._kept = (panels, row_scales)
        self.struct = MatrixStruct(
            kind,
            out_features,
            in_features,
            panels.data_ptr(),
            None if row_scales is None else row_scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
        )
        self.code_bytes: int = out_features * in_features * _CODE_BITS[kind] // 8 + bias_bytes(bias)
        groups = in_features // INT4_GROUP if kind == _INT4 else 0
        self._scale_bytes = 0 if kind == _DENSE else out_features * (4 + groups)

    @property
    def out_features(self) -> int:
        return int(self.struct.out_features)

    @property
    def scale_bytes(self) -> int:
        return self._scale_bytes

    def __call__(self, x: Tensor) -> Tensor:
        native = kernels()
        assert native is not None
        return native.linear(self.struct, x.contiguous())

    def moved(self, num_bytes: int) -> PanelLinear:
        """What lies so many bytes from this matrix, in the same memory, which this one's tensors keep alive: one of the
        same shape, without a bias."""
        assert self._bias is None
        other = copy.copy(self)
        here = self.struct
        scales = None if here.row_scales is None else here.row_scales + num_bytes
        other.struct = MatrixStruct(
            here.kind, here.out_features, here.in_features, here.panels + num_bytes, scales, None
        )
        return other


@final
class PanelEmbedding:
    """The rows of a matrix in panels, which serves as the output head as well."""

    __slots__ = ("_dtype", "_linear")

    def __init__(self, linear: PanelLinear, dtype: torch.dtype) -> None:
        self._linear, self._dtype = linear, dtype

    def lookup(self, ids: Tensor) -> Tensor:
        native = kernels()
        assert native is not None
        return native.lookup(self._linear.struct, ids.contiguous(), self._dtype)


def takes_panels(dtype: torch.dtype, device: torch.device, in_features: int) -> bool:
    """Whether matrices of so many columns go into panels here, where hidden states are of `dtype`."""
    fits = in_features % _COLUMNS == 0 and in_features <= _MOST_COLUMNS
    return device.type == "cpu" and dtype in NATIVE_DTYPES and fits and kernels() is not None


def room_for_panels(memory: PanelMemory, out_features: int, in_features: int) -> Tensor:
    """An uninitialised bfloat16 [N, K], N being padded to whole panels, for `dense_panels`."""
    return memory.take((_padded(out_features), in_features), torch.bfloat16)


def dense_panels(rows: Tensor, out_features: int, bias: Tensor | None) -> PanelLinear:
    """Of a `room_for_panels` whose first `out_features` rows were filled."""
    return _put(_DENSE, rows, rows.shape[1], out_features, bias)


def packed_panels(
    packed: StoredMatrix, bias: Tensor | None, memory: PanelMemory, *, in_place: bool = False
) -> PanelLinear | None:
    """Of a quantised matrix, whose int8 codes lie in `memory` with `in_place`; all others are copied there. None for
    what the kernels do not know: zeros or an order of GPTQ's, and its groups."""
    if isinstance(packed, PackedInt8):
        codes = _codes(packed, memory, in_place=in_place)
        row_scales = memory.copy(pad_rows(packed.scales))
        return _put(_INT8, codes, packed.in_features, packed.out_features, bias, row_scales)
    if isinstance(packed, PanelInt4):
        kept = {name: memory.copy(tensor) for name, tensor in packed.tensors().items()}
        return PanelLinear(_INT4, kept["panels"], packed.in_features, packed.out_features, bias, kept["row_scales"])
    if packed.row_scales is None or packed.zeros is not None or packed.input_order is not None:
        return None
    if packed.group_size != INT4_GROUP:
        return None
    native = kernels()
    assert native is not None
    panels = memory.take(panel_shape(packed.out_features, packed.in_features), torch.uint8)
    native.make_int4_panels(packed.codes.contiguous(), packed.scales.contiguous(), panels)
    row_scales = memory.copy(pad_rows(packed.row_scales))
    return PanelLinear(_INT4, panels, packed.in_features, packed.out_features, bias, row_scales)


def _put(
    kind: int,
    rows: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    row_scales: Tensor | None = None,
) -> PanelLinear:
    native = kernels()
    assert native is not None
    native.make_panels(rows, flip=_INT8_FLIP if kind == _INT8 else 0)
    return PanelLinear(kind, rows, in_features, out_features, bias, row_scales)


def _codes(packed: PackedInt8, memory: PanelMemory, *, in_place: bool) -> Tensor:
    """The codes, or a copy of them, in `memory`, padded to whole panels."""
    num_rows, num_columns = packed.codes.shape
    if in_place and num_rows % PANEL_ROWS == 0:
        return packed.codes
    room = memory.take((_padded(num_rows), num_columns), packed.codes.dtype)
    room[:num_rows] = packed.codes
    room[num_rows:] = 0
    return room


def _padded(out_features: int) -> int:
    return -(-out_features // PANEL_ROWS) * PANEL_ROWS
