"""The packed format against its formula, written out value by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie45.presets import INT4_GROUP, code_bytes, scale_bytes
from ernie45.quantization.packed import (
    PackedInt4,
    PackedInt8,
    dequantize,
    empty_packed,
    num_bytes,
    pack_int4,
    unpack_int4,
)

N, K, GROUP_SIZE = 3, 64, 16
G = K // GROUP_SIZE
DRAW = torch.Generator().manual_seed(0)
CODES = torch.randint(0, 16, (N, K), generator=DRAW, dtype=torch.uint8)
INT8_SCALES = torch.randint(-127, 128, (N, G), generator=DRAW, dtype=torch.int8)
FLOAT_SCALES = torch.rand(N, G, generator=DRAW).half()
ROW_SCALES = torch.rand(N, generator=DRAW)
ZEROS = torch.randint(0, 16, (N, G), generator=DRAW, dtype=torch.uint8)
INPUT_ORDER = torch.randperm(K, generator=DRAW).int()


def expected_int4(
    scales: Tensor, *, row_scales: Tensor | None, zeros: Tensor | None, input_order: Tensor | None
) -> Tensor:
    """w[n, input_order[k]] = (code[n, k] - zeros[n, g]) · scales[n, g] · row_scales[n]"""
    weight = torch.zeros(N, K)
    for n in range(N):
        for k in range(K):
            g = k // GROUP_SIZE
            value = (int(CODES[n, k]) - (8 if zeros is None else int(zeros[n, g]))) * float(scales[n, g])
            if row_scales is not None:
                value *= float(row_scales[n])
            weight[n, k if input_order is None else int(input_order[k])] = value
    return weight


@pytest.mark.parametrize("input_order", [None, INPUT_ORDER])
@pytest.mark.parametrize("zeros", [None, ZEROS])
@pytest.mark.parametrize(("scales", "row_scales"), [(INT8_SCALES, ROW_SCALES), (FLOAT_SCALES, None)])
def test_int4_weights_follow_the_formula(
    scales: Tensor, row_scales: Tensor | None, zeros: Tensor | None, input_order: Tensor | None
) -> None:
    packed = PackedInt4(
        codes=pack_int4(CODES, GROUP_SIZE),
        scales=scales,
        row_scales=row_scales,
        zeros=zeros,
        input_order=input_order,
    )
    assert (packed.out_features, packed.in_features, packed.group_size) == (N, K, GROUP_SIZE)
    expected = expected_int4(scales, row_scales=row_scales, zeros=zeros, input_order=input_order)
    weight = dequantize(packed)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    assert torch.equal(packed.rows(1, 3), weight[1:3])


def test_int8_weights_follow_the_formula() -> None:
    codes = torch.tensor([[-127, 0, 64], [127, 1, -1]], dtype=torch.int8)
    packed = PackedInt8(codes=codes, scales=torch.tensor([0.5, 2.0]))
    assert (packed.out_features, packed.in_features) == (2, 3)
    expected = torch.tensor([[-63.5, 0.0, 32.0], [254.0, 2.0, -2.0]])
    assert torch.equal(dequantize(packed), expected)
    assert torch.equal(packed.rows(1, 2), expected[1:])


@pytest.mark.parametrize("group_size", [2, 16, 32, 64])
def test_a_byte_holds_a_column_of_each_half_of_its_group(group_size: int) -> None:
    packed = pack_int4(CODES, group_size)
    assert packed.dtype == torch.uint8
    assert packed.shape == (N, K // 2)
    half = group_size // 2
    for n in range(N):
        for place in range(K // 2):
            low = place // half * group_size + place % half
            assert int(packed[n, place]) == int(CODES[n, low]) + 16 * int(CODES[n, low + half])


@pytest.mark.parametrize("group_size", [2, 16, 32, 64])
def test_unpacking_undoes_packing(group_size: int) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_int4(unpack_int4(every_byte, group_size), group_size), every_byte)
    assert torch.equal(unpack_int4(pack_int4(CODES, group_size), group_size), CODES)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 32), (5, 96)])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_room_has_the_bytes_that_a_plan_counts(scheme: str, num_rows: int, num_columns: int) -> None:
    packed = empty_packed(scheme, num_rows, num_columns, INT4_GROUP, torch.device("cpu"))
    assert (packed.out_features, packed.in_features) == (num_rows, num_columns)
    counted = code_bytes(scheme, num_rows, num_columns, 2) + scale_bytes(scheme, num_rows, num_columns)  # type: ignore[arg-type]
    assert num_bytes(packed) == counted
    assert list(packed.tensors()) == (["codes", "scales"] if scheme == "int8" else ["codes", "scales", "row_scales"])
