"""Weights of the quantised Paddle releases: the parts whose storage is documented.

2-bit experts are those of ERNIE-4.5-300B-A47B-2Bits, layers 7 to 53 (CCQ, https://arxiv.org/abs/2507.07145, and
FastDeploy's `winx_unzip` operator). FP8 is e4m3 (https://arxiv.org/abs/2209.05433) with scales that multiply. No
published file has been decoded with these functions yet, and loading refuses such checkpoints: what else they hold is
not documented (docs/decisions/0009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ernie45.errors import TensorError

GROUP_ROWS = 64
"""Rows of a 2-bit matrix that share a 4-bit scale."""

FP8_BLOCK = 128
"""Rows, and columns, of a block of FP8 weights that share a scale."""

_FIELD_SHIFTS = (9, 6, 3, 0)
_FIELD_MASK = 0x3F
_FIELD_ZERO = 32
_ROWS_PER_BYTE = len(_FIELD_SHIFTS)
_ROWS_PER_STEP = 4 * GROUP_ROWS  # of the result: bounds what is alive beside it

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP8_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)


def decode_two_bit_expert(
    quant_weight: Tensor, weight_scale: Tensor, super_scales: Tensor, code_scale: Tensor, code_zp: Tensor
) -> Tensor:
    """Decode a 2-bit expert matrix of K inputs and N outputs to float32 [K, N].

    A byte b of column n stands for the word v = floor(b · code_scale[n] + code_zp[n] + 0.5). Rows 4r to 4r + 3 are the
    six bits of v from bit 9, 6, 3 and 0 on, minus 32: neighbours share three bits. Each is multiplied by its group's
    4-bit scale and by super_scales[n]. Beside the result, a few hundred rows are alive at a time.

    Args:
        quant_weight: uint8 [K/4, N]; K is a multiple of 128.
        weight_scale: uint8 [K/128, N], two scales to a byte: the high half for the even group of 64 rows, the low half
            for the odd one.
        super_scales: bfloat16, float16 or float32 [N].
        code_scale: float32 [N].
        code_zp: float32 [N].

    Raises:
        TensorError: another shape or dtype, or code values that give no 32-bit integer.
    """
    _check_dtype("quant_weight", quant_weight, (torch.uint8,))
    _check_dtype("weight_scale", weight_scale, (torch.uint8,))
    _check_dtype("super_scales", super_scales, _SCALE_DTYPES)
    _check_dtype("code_scale", code_scale, (torch.float32,))
    _check_dtype("code_zp", code_zp, (torch.float32,))
    _check_matrix("quant_weight", quant_weight)
    num_rows, num_columns = quant_weight.shape[0] * _ROWS_PER_BYTE, quant_weight.shape[1]
    if num_rows % (2 * GROUP_ROWS):
        raise TensorError(
            f"quant_weight {_shape(quant_weight)} gives {num_rows} rows, which is not a multiple of {2 * GROUP_ROWS}",
            hint="its rows come in pairs of groups, 64 rows each and 4 rows to a byte",
        )
    _check_shape("weight_scale", weight_scale, (num_rows // (2 * GROUP_ROWS), num_columns))
    for name, values in (("super_scales", super_scales), ("code_scale", code_scale), ("code_zp", code_zp)):
        _check_shape(name, values, (num_columns,))
    _check_codes(code_scale, code_zp)

    weight = torch.empty(num_rows, num_columns, dtype=torch.float32, device=quant_weight.device)
    for start in range(0, num_rows, _ROWS_PER_STEP):
        part = weight[start : start + _ROWS_PER_STEP]
        stop = start + part.shape[0]
        codes = quant_weight[start // _ROWS_PER_BYTE : stop // _ROWS_PER_BYTE].float()
        words = codes.mul_(code_scale).add_(code_zp).add_(0.5).floor_().int()
        fields = part.unflatten(0, (-1, _ROWS_PER_BYTE))
        for place, shift in enumerate(_FIELD_SHIFTS):
            fields[:, place] = ((words >> shift) & _FIELD_MASK) - _FIELD_ZERO
        pairs = weight_scale[start // (2 * GROUP_ROWS) : stop // (2 * GROUP_ROWS)]
        scales = torch.stack((pairs >> 4, pairs & 0x0F), dim=1) * super_scales.float()
        part.unflatten(0, (-1, GROUP_ROWS)).mul_(scales.flatten(0, 1)[:, None])
    return weight


def decode_block_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Decode FP8 weights with a scale for each block of 128 x 128 to float32 [R, C].

    Blocks at the end of a row or column may be smaller. The layout is square, so it does not matter which axis is the
    input. The scale multiplies, also where torch checkpoints call it `weight_scale_inv`.

    Args:
        weight: float8_e4m3fn [R, C], or its bytes as int8 or uint8.
        scale: bfloat16, float16 or float32 [ceil(R/128), ceil(C/128)].

    Raises:
        TensorError: another shape or dtype.
    """
    values = _as_fp8(weight)
    _check_dtype("scale", scale, _SCALE_DTYPES)
    num_rows, num_columns = values.shape
    _check_shape("scale", scale, (math.ceil(num_rows / FP8_BLOCK), math.ceil(num_columns / FP8_BLOCK)))
    decoded = values.float()
    for block, row_scales in enumerate(scale.float()):
        rows = decoded[block * FP8_BLOCK : (block + 1) * FP8_BLOCK]
        rows.mul_(row_scales.repeat_interleave(FP8_BLOCK)[:num_columns])
    return decoded


def decode_tensor_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Decode FP8 weights with one scale for all of them to float32 [R, C].

    ERNIEKit's FP8 training rotates the inputs of such a layer by a block-diagonal Hadamard matrix. Weights from it are
    right for rotated inputs alone, and with plain ones give wrong answers without an error. Neither bytes nor scale
    show it, so this function cannot know: the caller must.

    Args:
        weight: float8_e4m3fn [R, C], or its bytes as int8 or uint8.
        scale: bfloat16, float16 or float32, of shape [] or [1]; it multiplies.

    Raises:
        TensorError: another shape or dtype.
    """
    values = _as_fp8(weight)
    _check_dtype("scale", scale, _SCALE_DTYPES)
    if tuple(scale.shape) not in ((), (1,)):
        raise TensorError(
            f"scale has the shape {_shape(scale)}, expected [] or [1]",
            hint="one scale per block is for decode_block_fp8; another shape is an unknown format",
        )
    return values.float().mul_(scale.float())


def _as_fp8(weight: Tensor) -> Tensor:
    _check_dtype("weight", weight, _FP8_DTYPES)
    _check_matrix("weight", weight)
    return weight.view(torch.float8_e4m3fn)


def _check_codes(code_scale: Tensor, code_zp: Tensor) -> None:
    """The words of bytes 0 and 255, the extremes, must be 32-bit integers; NaN and infinity are none."""
    for byte in (0, 255):
        words = code_scale * byte + code_zp
        wrong = ~(words.abs() < 2**31)
        if wrong.any():
            column = int(wrong.nonzero()[0])
            raise TensorError(
                f"column {column}: code_scale {code_scale[column].item()} and code_zp {code_zp[column].item()} make "
                f"{words[column].item()} of the byte {byte}, which is no 32-bit integer",
                hint="the file is damaged, or holds another kind of tensor under this name",
            )


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TensorError(
            f"{name} has the dtype {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}",
            hint="bytes read under another dtype of the same width can be given as tensor.view(dtype)",
        )


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 2:
        raise TensorError(
            f"{name} has the shape {_shape(tensor)}, expected two dimensions", hint="give one matrix at a time"
        )


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise TensorError(
            f"{name} has the shape {_shape(tensor)}, expected {list(expected)}",
            hint="the tensors belong to different weights, or to a format that ernie45 does not know",
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
