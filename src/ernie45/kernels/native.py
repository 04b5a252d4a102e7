"""The native kernels as Python sees them: the structs and functions of csrc/ernie45.h, by ctypes.

Structs hold addresses only. Whoever makes one keeps the tensors it points into.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ernie45.errors import OutOfMemoryError
from ernie45.kernels.library import MOST_THREADS, native_library, set_threads

_NUMBER, _ADDRESS, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of hidden states that the kernels take."""


class MatrixStruct(ctypes.Structure):
    """`E45Matrix`: `kind` is 0 for bfloat16, 1 for int8, 2 for int4."""

    _fields_: ClassVar = [
        ("kind", _NUMBER),
        ("out_features", _NUMBER),
        ("in_features", _NUMBER),
        ("panels", _ADDRESS),
        ("row_scales", _ADDRESS),
        ("bias", _ADDRESS),
    ]


class NormStruct(ctypes.Structure):
    """`E45Norm`."""

    _fields_: ClassVar = [("weight", _ADDRESS), ("eps", _FLOAT)]


class AttentionStruct(ctypes.Structure):
    """`E45Attention`."""

    _fields_: ClassVar = [
        ("norm", NormStruct),
        ("qkv", MatrixStruct),
        ("out", MatrixStruct),
        ("num_heads", _NUMBER),
        ("num_kv_heads", _NUMBER),
        ("head_dim", _NUMBER),
    ]


class BatchStruct(ctypes.Structure):
    """`E45Batch`."""

    _fields_: ClassVar = [
        ("num_tokens", _NUMBER),
        ("num_rows", _NUMBER),
        ("slots", _ADDRESS),
        ("starts", _ADDRESS),
        ("counts", _ADDRESS),
        ("cos", _ADDRESS),
        ("sin", _ADDRESS),
    ]


class KVStruct(ctypes.Structure):
    """`E45KV`: `kind` is 0 for float32, 1 for bfloat16, 2 for int8."""

    _fields_: ClassVar = [
        ("kind", _NUMBER),
        ("context_tokens", _NUMBER),
        ("keys", _ADDRESS),
        ("values", _ADDRESS),
        ("key_scales", _ADDRESS),
        ("value_scales", _ADDRESS),
    ]


class MlpStruct(ctypes.Structure):
    """`E45Mlp`."""

    _fields_: ClassVar = [("gate_up", MatrixStruct), ("down", MatrixStruct)]


class RouterStruct(ctypes.Structure):
    """`E45Router`."""

    _fields_: ClassVar = [
        ("weight", _ADDRESS),
        ("correction", _ADDRESS),
        ("num_experts", _NUMBER),
        ("width", _NUMBER),
        ("num_chosen", _NUMBER),
        ("norm_min", _FLOAT),
    ]


class PartStruct(ctypes.Structure):
    """`E45Part`."""

    _fields_: ClassVar = [("numbers", _ADDRESS), ("count", _NUMBER), ("outputs", _ADDRESS)]


class LayerStruct(ctypes.Structure):
    """`E45Layer`."""

    _fields_: ClassVar = [
        ("attention", AttentionStruct),
        ("norm", NormStruct),
        ("router", _ADDRESS),
        ("experts", _ADDRESS),
        ("shared", _ADDRESS),
    ]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "make_panels": (_ADDRESS, _NUMBER, _NUMBER, _NUMBER),
    "make_int4_panels": (_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS),
    "linear": (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER),
    "lookup": (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER),
    "attention": (_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER),
    "mlp": (_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER),
    "route": (_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS),
    "experts": (
        _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _NUMBER
    ),
    "add_outputs": (
        _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _NUMBER, _NUMBER, _NUMBER
    ),
    "layers": (_ADDRESS, _ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER),
    "head": (_ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS),
}  # fmt: skip


class Kernels:
    """The library's functions. Hidden states x [N, h] are contiguous, float32 or bfloat16, and changed in place where
    the C header says "x +="; every method raises OutOfMemoryError where there is no room for intermediate values."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {}
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"e45_{name}")
            function.argtypes, function.restype = types, ctypes.c_int
            self._functions[name] = function

    def make_panels(self, rows: Tensor, *, flip: int = 0) -> None:
        """Put the matrix `rows` [64 · n, ·], contiguous, into panels where it is, with bytes XORed with `flip`."""
        num_panels = rows.shape[0] // 64
        num_dwords = rows[0].numel() * rows.element_size() // 4
        self._call("make_panels", rows.data_ptr(), num_panels, num_dwords, flip)

    def make_int4_panels(self, codes: Tensor, scales: Tensor, panels: Tensor) -> None:
        """Codes uint8 [N, K / 2] and scales int8 [N, K / 32], both contiguous -> `panels`, which takes N as a multiple
        of 64 and a dword of scales for each four groups."""
        num_rows, num_bytes = codes.shape
        addresses = codes.data_ptr(), scales.data_ptr()
        self._call("make_int4_panels", *addresses, num_rows, 2 * num_bytes, panels.data_ptr())

    def linear(self, matrix: MatrixStruct, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]"""
        y = torch.empty((x.shape[0], matrix.out_features), dtype=x.dtype)
        self._call("linear", ctypes.addressof(matrix), x.data_ptr(), len(x), y.data_ptr(), _DTYPES[x.dtype])
        return y

    def lookup(self, matrix: MatrixStruct, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids int64 [N] -> rows of the matrix [N, in]"""
        y = torch.empty((len(ids), matrix.in_features), dtype=dtype)
        self._call("lookup", ctypes.addressof(matrix), ids.data_ptr(), len(ids), y.data_ptr(), _DTYPES[dtype])
        return y

    def attention(self, part: AttentionStruct, batch: BatchStruct, kv: KVStruct, x: Tensor) -> None:
        """x += attention(norm(x)), new keys and values being written to the cache"""
        self._call(
            "attention",
            ctypes.addressof(part),
            ctypes.addressof(batch),
            ctypes.addressof(kv),
            x.data_ptr(),
            _DTYPES[x.dtype],
        )

    def mlp(self, norm: NormStruct, mlp: MlpStruct, x: Tensor) -> None:
        """x += mlp(norm(x))"""
        self._call("mlp", ctypes.addressof(norm), ctypes.addressof(mlp), x.data_ptr(), len(x), _DTYPES[x.dtype])

    def route(self, norm: NormStruct, router: RouterStruct, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x) -> expert numbers int64 [N, K] and their shares float32 [N, K]"""
        chosen = torch.empty((len(x), router.num_chosen), dtype=torch.int64)
        shares = torch.empty(chosen.shape, dtype=torch.float32)
        addresses = ctypes.addressof(norm), ctypes.addressof(router), x.data_ptr()
        self._call("route", *addresses, len(x), _DTYPES[x.dtype], chosen.data_ptr(), shares.data_ptr())
        return chosen, shares

    def experts(
        self,
        norm: NormStruct,
        table: ctypes.Array[ctypes.c_void_p],
        shared: MlpStruct | None,
        chosen: Tensor,
        shares: Tensor,
        x: Tensor,
        numbers: Sequence[int] = (),
        outputs: Tensor | None = None,
    ) -> None:
        """x += the sum of shares · experts(norm(x)) + shared(norm(x)); `table` has the address of an `MlpStruct` for
        each expert, of which only chosen ones are read.

        With `outputs` float32 [N · K + N, h] x is not changed. What the experts of these `numbers`, and a shared MLP,
        give is put there instead, into the rows of the choices, and then of the tokens. There must be something to put.
        """
        part = PartStruct(None, len(table), None)
        if outputs is not None:
            listed = (ctypes.c_int64 * len(numbers))(*numbers)
            part = PartStruct(ctypes.addressof(listed), len(numbers), outputs.data_ptr())
        self._call(
            "experts",
            ctypes.addressof(norm),
            ctypes.addressof(table),
            ctypes.addressof(part),
            None if shared is None else ctypes.addressof(shared),
            chosen.data_ptr(),
            shares.data_ptr(),
            chosen.shape[1],
            x.data_ptr(),
            len(x),
            _DTYPES[x.dtype],
        )

    def add_outputs(self, outputs: Tensor, *, has_shared: bool, chosen: Tensor, shares: Tensor, x: Tensor) -> None:
        """As `experts`, with the same bits, once all are among the `outputs`."""
        addresses = chosen.data_ptr(), shares.data_ptr()
        sizes = *x.shape, _DTYPES[x.dtype]
        self._call("add_outputs", outputs.data_ptr(), has_shared, *addresses, chosen.shape[1], x.data_ptr(), *sizes)

    def layers(
        self,
        layers: ctypes.Array[LayerStruct],
        caches: ctypes.Array[KVStruct],
        batch: BatchStruct,
        x: Tensor,
    ) -> None:
        """x through the layers; `caches` has the keys and values of each."""
        addresses = ctypes.addressof(layers), ctypes.addressof(caches), len(layers), ctypes.addressof(batch)
        self._call("layers", *addresses, x.data_ptr(), _DTYPES[x.dtype])

    def head(self, norm: NormStruct, matrix: MatrixStruct, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, h] -> logits float32 [M, V] of norm(x), in `out` where that is given"""
        logits = torch.empty((len(x), matrix.out_features), dtype=torch.float32) if out is None else out
        addresses = ctypes.addressof(norm), ctypes.addressof(matrix), x.data_ptr()
        self._call("head", *addresses, len(x), _DTYPES[x.dtype], logits.data_ptr())
        return logits

    def _call(self, name: str, *arguments: int | None) -> None:
        if self._functions[name](*arguments):
            raise OutOfMemoryError(
                f"the native kernel {name!r} found no memory for its intermediate values",
                hint="close other programs, or load the model with a smaller context_tokens or max_batch",
            )


@functools.cache
def kernels() -> Kernels | None:
    """The native kernels, on as many threads as torch has; None where there is no library (`library.why_not`)."""
    library = native_library()
    if library is None:
        return None
    set_threads(min(torch.get_num_threads(), MOST_THREADS))
    return Kernels(library)


def trim() -> None:
    """Give back what the kernels keep between calls, and end their threads. Other models in the process may go on: the
    next call makes both anew."""
    library = native_library()
    if library is not None:
        library.e45_trim()


def batch_struct(rows: Sequence[tuple[int, int, int]], cos: Tensor, sin: Tensor) -> tuple[BatchStruct, Tensor]:
    """`rows` are (slot, first position, number of tokens); cos and sin float32 [N, D/2], contiguous -> the struct, and
    the tensor that it points into beside cos and sin."""
    numbers = torch.tensor(rows, dtype=torch.int64).t().contiguous()
    slots, starts, counts = (numbers[index].data_ptr() for index in range(3))
    return BatchStruct(cos.shape[0], len(rows), slots, starts, counts, cos.data_ptr(), sin.data_ptr()), numbers


def kv_struct(keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None) -> KVStruct:
    """Of one layer's keys and values, in the memory of tensors [slots, Hkv, context, D], with the scales
    [slots, Hkv, context] of int8 ones; the context is a multiple of 32."""
    scales = [None if tensor is None else tensor.data_ptr() for tensor in (key_scales, value_scales)]
    return KVStruct(_DTYPES[keys.dtype], keys.shape[2], keys.data_ptr(), values.data_ptr(), *scales)
