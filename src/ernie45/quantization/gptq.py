"""GPTQ's 4-bit matrices in our own form, value for value.

The packing rule is that of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel, nn_modules/qlinear): an
int32 word holds eight codes, the first in its lowest bits.

Shape letters: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie45.errors import TensorError, UnsupportedError
from ernie45.quantization.packed import INT4_ZERO, PackedInt4, pack_int4

_CODES_PER_WORD = 8
_ONE_IN_EACH_CODE = 0x11111111
_GROUP_MULTIPLE = 32
_BLOCK_VALUES = 1 << 20  # of a matrix, unpacked at a time
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DAMAGED = "the weights are damaged, or not of the format that config.json says: fetch the files again"


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    *,
    stores_zero_minus_one: bool,
    name: str = "matrix",
) -> PackedInt4:
    """A GPTQ matrix whose every value (code - zero) · scale stays what it is.

    Args:
        qweight: int32 [K/8, N], eight inputs' codes in a word.
        qzeros: int32 [G, N/8], eight outputs' zeros in a word; the last may hold fewer.
        scales: float16, bfloat16 or float32 [G, N].
        g_idx: int32 [K], the group of each input; all groups are of one size.
        stores_zero_minus_one: the format "gptq", whose words are 0x11111111 less than those of "gptq_v2". Where a zero
            is 0 that borrows from the next in its word, as GPTQModel writes and reads it.
        name: what errors call the matrix.

    Raises:
        TensorError: another shape or dtype, or groups that are not of one size.
        UnsupportedError: groups of a size that is no multiple of 32.
    """
    num_groups, group_size = _check(qweight, qzeros, scales, g_idx, name)
    order = input_order(g_idx, num_groups, name)
    num_inputs, num_outputs = len(g_idx), qweight.shape[1]
    zeros = _unpack(qzeros + _ONE_IN_EACH_CODE if stores_zero_minus_one else qzeros)[:, :num_outputs]
    codes = torch.empty((num_outputs, num_inputs // 2), dtype=torch.uint8, device=qweight.device)
    step = max(1, _BLOCK_VALUES // num_inputs)
    for start in range(0, num_outputs, step):
        block = _unpack(qweight[:, start : start + step].T)
        codes[start : start + step] = pack_int4(block if order is None else block[:, order], group_size)
    return PackedInt4(
        codes=codes,
        scales=scales.T.contiguous(),
        zeros=None if bool((zeros == INT4_ZERO).all()) else zeros.T.contiguous(),
        input_order=order,
    )


def input_order(g_idx: Tensor, num_groups: int, name: str) -> Tensor | None:
    """The inputs group by group, int32 [K], by the group of each; None where they already stand so.

    Raises TensorError for groups that are not there, or not of one size. `name` is what it calls the matrix.
    """
    lowest, highest = int(g_idx.min()), int(g_idx.max())
    if lowest < 0 or highest >= num_groups:
        raise TensorError(
            f"{name}.g_idx names groups from {lowest} to {highest}, but there are {num_groups}", hint=_DAMAGED
        )
    sizes = torch.bincount(g_idx, minlength=num_groups)
    if bool((sizes != sizes[0]).any()):
        raise TensorError(
            f"{name}.g_idx has groups of {int(sizes.min())} to {int(sizes.max())} inputs, but all must be of one size",
            hint="quantise the model again with a group size that divides all its widths, such as 32",
        )
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True).to(torch.int32)


def stack(parts: Sequence[PackedInt4]) -> PackedInt4 | None:
    """Matrices that `from_gptq` gave as one, rows under rows; None where they differ in groups, scales' dtype or the
    order of their inputs."""
    first = parts[0]
    if not all(_same_columns(first, part) for part in parts[1:]):
        return None
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat(
            [
                torch.full(part.scales.shape, INT4_ZERO, dtype=torch.uint8, device=part.codes.device)
                if part.zeros is None
                else part.zeros
                for part in parts
            ]
        )
    return PackedInt4(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=zeros,
        input_order=first.input_order,
    )


def _same_columns(first: PackedInt4, other: PackedInt4) -> bool:
    one, two = first.input_order, other.input_order
    return (
        (first.in_features, first.group_size) == (other.in_features, other.group_size)
        and first.scales.dtype == other.scales.dtype
        and (one is None) == (two is None)
        and (one is None or two is None or torch.equal(one, two))
    )


def _check(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, name: str) -> tuple[int, int]:
    """Number and size of the groups, which all four tensors agree on."""
    for part, tensor, dtypes, num_axes in (
        ("qweight", qweight, (torch.int32,), 2),
        ("qzeros", qzeros, (torch.int32,), 2),
        ("scales", scales, _SCALE_DTYPES, 2),
        ("g_idx", g_idx, (torch.int32,), 1),
    ):
        if tensor.dtype not in dtypes or tensor.dim() != num_axes or tensor.numel() == 0:
            raise TensorError(
                f"{name}.{part} is {_named(tensor.dtype)} {list(tensor.shape)}, but GPTQ needs "
                f"{' or '.join(map(_named, dtypes))} with {num_axes} axes",
                hint=_DAMAGED,
            )
    num_inputs, num_outputs = _CODES_PER_WORD * qweight.shape[0], qweight.shape[1]
    num_groups = scales.shape[0]
    for part, tensor, wanted in (
        ("scales", scales, [num_groups, num_outputs]),
        ("qzeros", qzeros, [num_groups, -(-num_outputs // _CODES_PER_WORD)]),
        ("g_idx", g_idx, [num_inputs]),
    ):
        if list(tensor.shape) != wanted:
            raise TensorError(
                f"{name}.{part} is {list(tensor.shape)}, but beside {name}.qweight {list(qweight.shape)} and "
                f"{num_groups} groups it must be {wanted}",
                hint=_DAMAGED,
            )
    if num_inputs % num_groups:
        raise TensorError(
            f"{name} has {num_inputs} inputs, which do not divide into {num_groups} groups of one size",
            hint="quantise the model again with a group size that divides all its widths, such as 32",
        )
    if num_inputs // num_groups % _GROUP_MULTIPLE:
        raise UnsupportedError(
            f"{name} has groups of {num_inputs // num_groups} inputs: only multiples of {_GROUP_MULTIPLE} are read",
            hint="quantise the model again with groups of 32, 64 or 128",
        )
    return num_groups, num_inputs // num_groups


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, C] -> the eight codes of each word, uint8 [R, 8C], lowest bits first."""
    pairs = words.contiguous().view(torch.uint8)  # little-endian, as on every machine that torch runs on
    return torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
