from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ernie45.errors import TensorError, UnsupportedError
from ernie45.quantization import gptq
from ernie45.quantization.gptq import from_gptq, stack
from ernie45.quantization.packed import PackedInt4, dequantize
from tests.gptq_files import FloatArray, GptqMatrix, group_index, quantise

WRITTEN_BY_GPTQMODEL = Path(__file__).resolve().parents[1] / "data" / "gptq" / "gptqmodel-7.7.0.safetensors"


def some_weight(num_outputs: int, num_inputs: int, seed: int = 0) -> FloatArray:
    """Some rows have positive values only, so that their zeros are 0 where groups are asymmetric."""
    weight = np.random.RandomState(seed).standard_normal((num_outputs, num_inputs)).astype(np.float32)
    weight[::3] = np.abs(weight[::3])
    return weight


def tensors_of(matrix: GptqMatrix) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in matrix.tensors.items()}


def convert(tensors: Mapping[str, torch.Tensor], *, version: int = 1) -> PackedInt4:
    parts = (tensors[part] for part in ("qweight", "qzeros", "scales", "g_idx"))
    return from_gptq(*parts, stores_zero_minus_one=version == 1, name="layers.3.o_proj")


def read(matrix: GptqMatrix, *, version: int = 1) -> PackedInt4:
    return convert(tensors_of(matrix), version=version)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", [None, 3], ids=["neighbours", "act-order"])
@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "group_size"),
    [(8, 32, 32), (24, 128, 32), (40, 192, 64), (16, 256, 128), (8, 96, 96)],
)
def test_every_value_stays_bit_for_bit(
    num_outputs: int, num_inputs: int, group_size: int, seed: int | None, symmetric: bool, version: Literal[1, 2]
) -> None:
    g_idx = group_index(num_inputs, group_size, seed=seed)
    matrix = quantise(some_weight(num_outputs, num_inputs), g_idx, symmetric=symmetric, version=version)
    packed = read(matrix, version=version)
    assert torch.equal(dequantize(packed), torch.from_numpy(matrix.values))
    assert (packed.out_features, packed.in_features, packed.group_size) == (num_outputs, num_inputs, group_size)
    assert packed.scales.dtype == torch.float16
    assert (packed.zeros is None) == symmetric
    assert (packed.input_order is None) == (seed is None or group_size == num_inputs)


@pytest.mark.parametrize("version", [1, 2])
def test_reads_what_gptqmodel_packed(version: int) -> None:
    # Act-order, groups of 32, zeros from 0 to 15; packed by GPTQModel 7.7.0 from the codes and zeros beside it.
    stored = {
        name.removeprefix(f"v{version}."): tensor
        for name, tensor in load_file(WRITTEN_BY_GPTQMODEL).items()
        if name.startswith(f"v{version}.")
    }
    codes, zeros, scales, groups = stored["codes"], stored["zeros"], stored["scales"], stored["g_idx"].long()
    assert {int(zeros.min()), int(zeros.max())} == {0, 15}
    expected = (codes.float() - zeros.float()[groups]) * scales.float()[groups]
    assert torch.equal(dequantize(convert(stored, version=version)), expected.T)


def test_blocks_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = quantise(some_weight(40, 64), group_index(64, 32, seed=1))
    monkeypatch.setattr(gptq, "_BLOCK_VALUES", 64 * 7)
    assert torch.equal(dequantize(read(matrix)), torch.from_numpy(matrix.values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_of_scales_are_kept(dtype: torch.dtype) -> None:
    matrix = quantise(some_weight(8, 64), group_index(64, 32))
    tensors = tensors_of(matrix)
    scales = tensors["scales"].to(dtype)
    packed = convert(tensors | {"scales": scales})
    codes = torch.from_numpy(matrix.values) / tensors["scales"].float().T.repeat_interleave(32, dim=1)
    assert packed.scales.dtype == dtype
    assert torch.equal(dequantize(packed), codes.round() * scales.float().T.repeat_interleave(32, dim=1))


def test_the_last_word_of_zeros_may_hold_fewer() -> None:
    matrix = quantise(some_weight(16, 64), group_index(64, 32), symmetric=False, version=2)
    tensors = tensors_of(matrix)
    cut = {"qweight": tensors["qweight"][:, :11], "scales": tensors["scales"][:, :11]}
    packed = convert(tensors | cut, version=2)
    assert torch.equal(dequantize(packed), torch.from_numpy(matrix.values[:11]))


def with_group(index: int, group: int) -> torch.Tensor:
    groups = torch.from_numpy(group_index(128, 32))
    groups[index] = group
    return groups


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"qweight": torch.zeros(16, 8)}, ("qweight is float32 [16, 8]", "int32 with 2 axes")),
        ({"qweight": torch.zeros(16, dtype=torch.int32)}, ("qweight is int32 [16]", "2 axes")),
        ({"qweight": torch.zeros(0, 8, dtype=torch.int32)}, ("qweight is int32 [0, 8]",)),
        ({"qzeros": torch.zeros(4, 1, dtype=torch.int64)}, ("qzeros is int64 [4, 1]",)),
        ({"scales": torch.zeros(4, 8, dtype=torch.float64)}, ("scales is float64", "float16 or bfloat16 or float32")),
        ({"g_idx": torch.zeros(128, dtype=torch.int64)}, ("g_idx is int64 [128]", "1 axes")),
        ({"qweight": torch.zeros(8, 8, dtype=torch.int32)}, ("g_idx is [128]", "[8, 8]", "must be [64]")),
        ({"qzeros": torch.zeros(4, 2, dtype=torch.int32)}, ("qzeros is [4, 2]", "4 groups", "must be [4, 1]")),
        ({"qzeros": torch.zeros(3, 1, dtype=torch.int32)}, ("qzeros is [3, 1]", "must be [4, 1]")),
        ({"scales": torch.ones(4, 7, dtype=torch.float16)}, ("scales is [4, 7]", "must be [4, 8]")),
        ({"g_idx": with_group(5, 4)}, ("groups from 0 to 4", "there are 4")),
        ({"g_idx": with_group(5, -1)}, ("groups from -1 to 3",)),
        ({"g_idx": with_group(5, 2)}, ("groups of 31 to 33 inputs",)),
        ({"g_idx": torch.zeros(128, dtype=torch.int32)}, ("groups of 0 to 128 inputs",)),
        (
            {"qzeros": torch.zeros(3, 1, dtype=torch.int32), "scales": torch.ones(3, 8, dtype=torch.float16)},
            ("128 inputs", "3 groups"),
        ),
    ],
)
def test_damage_is_named(changes: dict[str, torch.Tensor], texts: tuple[str, ...]) -> None:
    tensors = tensors_of(quantise(some_weight(8, 128), group_index(128, 32)))
    with pytest.raises(TensorError) as caught:
        convert(tensors | changes)
    assert [text for text in ("layers.3.o_proj", *texts) if text not in caught.value.message] == []
    assert caught.value.hint


@pytest.mark.parametrize("group_size", [16, 40])
def test_groups_of_other_sizes_are_refused(group_size: int) -> None:
    matrix = quantise(some_weight(8, 80), group_index(80, group_size))
    with pytest.raises(UnsupportedError, match=f"groups of {group_size} inputs"):
        read(matrix)


def parts_of(seeds: tuple[int | None, ...], **options: Any) -> tuple[list[PackedInt4], torch.Tensor]:
    """Matrices of 64 inputs and 8, 16, … outputs, and the values of all."""
    matrices = [
        quantise(some_weight(8 * number, 64, seed=number), group_index(64, 32, seed=seed), **options)
        for number, seed in enumerate(seeds, start=1)
    ]
    return [read(matrix) for matrix in matrices], torch.cat([torch.from_numpy(matrix.values) for matrix in matrices])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seeds", [(None, None, None), (4, 4)], ids=["neighbours", "act-order"])
def test_matrices_of_one_order_are_stacked(seeds: tuple[int | None, ...], symmetric: bool) -> None:
    parts, values = parts_of(seeds, symmetric=symmetric)
    stacked = stack(parts)
    assert stacked is not None
    assert torch.equal(dequantize(stacked), values)
    assert (stacked.zeros is None) == symmetric


def test_zeros_of_some_are_zeros_of_all() -> None:
    (plain,), values = parts_of((None,))
    (other,), other_values = parts_of((None,), symmetric=False)
    stacked = stack([plain, other])
    assert stacked is not None
    assert torch.equal(dequantize(stacked), torch.cat((values, other_values)))


def test_matrices_that_differ_are_not_stacked() -> None:
    (first, *others), _ = parts_of((None, 4, 5))
    assert stack([first, others[0]]) is None
    assert stack(others) is None
    one_group = read(quantise(some_weight(8, 64), group_index(64, 64)))
    assert stack([first, one_group]) is None
    more_inputs = read(quantise(some_weight(8, 128), group_index(128, 64)))
    assert stack([first, more_inputs]) is None
    tensors = tensors_of(quantise(some_weight(8, 64), group_index(64, 32)))
    other_scales = convert(tensors | {"scales": tensors["scales"].float()})
    assert stack([first, other_scales]) is None
