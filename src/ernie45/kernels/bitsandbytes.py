"""Weight matrices that bitsandbytes stores and multiplies: y = x Wᵀ + b."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.errors import UnsupportedError
from ernie45.kernels.linear import DenseLinear, bias_bytes
from ernie45.presets import NF4_BLOCK
from ernie45.quantization.quantize import round_int8

# Values that are quantised, and dequantised or multiplied, at a time. bitsandbytes takes up to 80 bytes for each one
# that it quantises, and 4 for each one that it multiplies on a CPU without AVX-512.
_QUANTIZED_VALUES = 1 << 20
_MULTIPLIED_VALUES = 1 << 22

# A multiple of these many rows ends on a block of scales, whatever a row's length, and on a tile of the fused product.
_ROW_STEP = 64
_FUSED_TILE_ROWS = 32

_importing = threading.Lock()


class Nf4Linear:
    """A weight matrix [out, in] as 4-bit codes of the NF4 table, with its product.

    `codes` uint8 has two values in a byte, `scales` a float32 for each 64 values in row-major order. The table of 16
    values is one for all matrices. A bf16 matrix on a CPU with AVX512-BF16, where its shape divides into tiles, has
    codes and scales in the order of bitsandbytes' fused product, which rounds the scales to bf16; others on a CPU are
    dequantised some rows at a time for every product. On a CPU in bf16 a row's bits do not depend on the others.

    Raises:
        UnsupportedError: bitsandbytes cannot be imported, or has no kernels for the weight's device.
    """

    __slots__ = ("bias", "codes", "fused", "in_features", "out_features", "scales")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        num_values, device = weight.numel(), weight.device
        self.codes = torch.empty(-(-num_values // 2), dtype=torch.uint8, device=device)
        self.scales = torch.empty(-(-num_values // NF4_BLOCK), dtype=torch.float32, device=device)
        self.fused = False
        if device.type == "meta":
            return
        check_bitsandbytes(device)
        self.fused = _has_fused_product(weight)
        for start, stop in _row_blocks(self.out_features, self.in_features, _QUANTIZED_VALUES):
            self._quantize(weight[start:stop], start, stop)

    @property
    def code_bytes(self) -> int:
        return self.codes.nbytes + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        return self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] in the weight's dtype -> [N, out]"""
        shape = (self.out_features, self.in_features)
        if not len(x):  # the fused product divides by the number of rows
            return x.new_empty((0, self.out_features))
        if self.fused:
            y: Tensor = torch.ops.bitsandbytes.gemv_4bit(
                x.contiguous(),
                self.codes.view(self.out_features, -1),
                shape,
                self.scales.view(-1, self.out_features).bfloat16(),
                _nf4_table(x.device),
                NF4_BLOCK,
            )
            return y if self.bias is None else y + self.bias
        if x.device.type == "cuda":
            bitsandbytes = _bitsandbytes()
            state = bitsandbytes.functional.QuantState(
                absmax=self.scales,
                shape=torch.Size(shape),
                code=_nf4_table(x.device),
                blocksize=NF4_BLOCK,
                quant_type="nf4",
                dtype=x.dtype,
            )
            y = bitsandbytes.matmul_4bit(x, self.codes[None], quant_state=state, bias=self.bias)
            return y
        y = x.new_empty((x.shape[0], self.out_features))
        for start, stop in _row_blocks(self.out_features, self.in_features, _MULTIPLIED_VALUES):
            bias = None if self.bias is None else self.bias[start:stop]
            y[:, start:stop] = DenseLinear(self._dequantize(start, stop, x.dtype), bias, pack=False)(x)
        return y

    def _quantize(self, weight: Tensor, start: int, stop: int) -> None:
        values = weight.flatten()
        values = F.pad(values, (0, -len(values) % NF4_BLOCK))
        codes, scales = torch.ops.bitsandbytes.quantize_4bit(values, NF4_BLOCK, "nf4", torch.uint8)
        if self.fused:
            # The order is private to the kernel, which comes with this function.
            functional = _bitsandbytes().functional
            state = functional.QuantState(
                absmax=scales, shape=weight.shape, dtype=weight.dtype, blocksize=NF4_BLOCK, quant_type="nf4"
            )
            codes, _ = functional._convert_weight_packed_for_cpu(codes, state, block_n=_FUSED_TILE_ROWS)
            self.scales.view(-1, self.out_features)[:, start:stop] = scales.view(stop - start, -1).T
        else:
            self._scales_of(start, stop).copy_(scales)
        room = self._codes_of(start, stop)
        room.copy_(codes.flatten()[: len(room)])

    def _dequantize(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        num_values = (stop - start) * self.in_features
        # The kernel works on the rows of this shape in parallel, and wants them even.
        shape = (1, num_values + num_values % 2) if num_values % NF4_BLOCK else (num_values // NF4_BLOCK, NF4_BLOCK)
        values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self._codes_of(start, stop), self._scales_of(start, stop), NF4_BLOCK, "nf4", shape, dtype
        )
        return values.flatten()[:num_values].view(stop - start, self.in_features)

    def _codes_of(self, start: int, stop: int) -> Tensor:
        return self.codes[start * self.in_features // 2 : -(-stop * self.in_features // 2)]

    def _scales_of(self, start: int, stop: int) -> Tensor:
        return self.scales[start * self.in_features // NF4_BLOCK : -(-stop * self.in_features // NF4_BLOCK)]


class BnbInt8Linear:
    """A weight matrix [out, in] as 8-bit codes with a scale for each row, and its product with inputs that are rounded
    to 8 bits row by row: LLM.int8() (arXiv 2208.07339) without its outlier columns, which would make a row depend on
    the others.

    `codes` int8 [out, in], `scales` float32 [out], w = codes · scales. Sums are exact integers on a GPU and on a CPU
    with AVX-512; on another CPU they are float32.

    Raises:
        UnsupportedError: bitsandbytes cannot be imported, or has no kernels for the weight's device.
    """

    __slots__ = ("bias", "codes", "in_features", "out_features", "scales")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(self.out_features, dtype=torch.float32, device=weight.device)
        if weight.device.type == "meta":
            return
        check_bitsandbytes(weight.device)
        for start, stop in _row_blocks(self.out_features, self.in_features, _QUANTIZED_VALUES):
            # Not bitsandbytes' own rounding, here and below: it passes through float16, where large values overflow.
            self.codes[start:stop], self.scales[start:stop] = round_int8(weight[start:stop].float())

    @property
    def code_bytes(self) -> int:
        return self.codes.nbytes + bias_bytes(self.bias)

    @property
    def scale_bytes(self) -> int:
        return self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]"""
        if not len(x):
            return x.new_empty((0, self.out_features))
        codes, scales = round_int8(x.float())
        y = torch.empty((x.shape[0], self.out_features), dtype=torch.float32, device=x.device)
        for start, stop in _row_blocks(self.out_features, self.in_features, _MULTIPLIED_VALUES):
            sums = torch.ops.bitsandbytes.int8_linear_matmul(codes, self.codes[start:stop])
            torch.mul(sums, scales[:, None] * self.scales[start:stop], out=y[:, start:stop])
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)


def check_bitsandbytes(device: torch.device) -> None:
    """Make sure, before weights are read, that matrices can be quantised and multiplied on `device`.

    Raises:
        UnsupportedError: bitsandbytes cannot be imported, or has no kernels for this device.
    """
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"bitsandbytes matrices run on 'cpu' and 'cuda', not on {device.type!r}",
            hint='use quantization="int8" or "int4", or another device',
        )
    cextension = _bitsandbytes().cextension
    if device.type == "cuda" and isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        raise UnsupportedError(
            "bitsandbytes has no GPU library for this version of CUDA",
            hint='`python -m bitsandbytes` says what is missing; or use quantization="int8" or "int4"',
        )


@cache
def _bitsandbytes() -> ModuleType:
    # On some CPUs bitsandbytes fetches native code from the Hub while it is imported, where the package "kernels" is
    # installed, and logs a warning where it is not.
    logger = logging.getLogger("bitsandbytes")
    with _importing:
        level, kernels = logger.level, sys.modules.get("kernels")
        logger.setLevel(logging.CRITICAL)
        sys.modules["kernels"] = None  # type: ignore[assignment]
        try:
            return importlib.import_module("bitsandbytes")
        except (ImportError, OSError, RuntimeError) as error:
            raise UnsupportedError(
                f"bitsandbytes cannot be imported: {error}",
                hint='pip install "bitsandbytes>=0.50.2", or use quantization="int8" or "int4"',
            ) from error
        finally:
            logger.setLevel(level)
            sys.modules.pop("kernels", None)
            if kernels is not None:
                sys.modules["kernels"] = kernels


@cache
def _nf4_table(device: torch.device) -> Tensor:
    table: Tensor = _bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return table


def _has_fused_product(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    out_features, in_features = weight.shape
    if out_features % _FUSED_TILE_ROWS or in_features % NF4_BLOCK:
        return False
    return bool(_bitsandbytes().functional.has_avx512bf16())


def _row_blocks(num_rows: int, row_values: int, num_values: int) -> Iterator[tuple[int, int]]:
    """First row, and the one after the last, of blocks of about `num_values` values."""
    step = max(_ROW_STEP, num_values // row_values // _ROW_STEP * _ROW_STEP)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
