"""Which matrices go into panels, and what these are as a model's weights."""

from __future__ import annotations

import pytest
import torch

from ernie45.kernels.packed_linear import Int4Linear, Int8Linear, UnpackingLinear, build_packed_linear
from ernie45.kernels.panels import (
    PanelEmbedding,
    PanelLinear,
    PanelMemory,
    dense_panels,
    packed_panels,
    room_for_panels,
    takes_panels,
)
from ernie45.quantization.packed import PackedInt4, dequantize, empty_packed, num_bytes
from ernie45.quantization.panels import PanelInt4, in_panels
from ernie45.quantization.quantize import quantize_into
from tests.kernels.panel_matrices import random
from tests.kernels.test_packed_linear import gptq, quantized

CPU = torch.device("cpu")


@pytest.mark.usefixtures("native")
def test_matrices_of_whole_groups_go_into_panels_on_a_cpu() -> None:
    for dtype, taken in [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]:
        assert takes_panels(dtype, CPU, 64) is taken
        assert isinstance(build_packed_linear(quantized("int8", (33, 64)), None, dtype), PanelLinear) is taken
        assert isinstance(build_packed_linear(quantized("int4", (33, 64)), None, dtype), PanelLinear) is taken
    assert not takes_panels(torch.bfloat16, CPU, 48)
    assert not takes_panels(torch.bfloat16, torch.device("meta"), 64)
    assert isinstance(build_packed_linear(quantized("int8", (33, 48)), None, torch.bfloat16), Int8Linear)


@pytest.mark.usefixtures("without_library")
def test_without_a_library_none_do() -> None:
    assert not takes_panels(torch.bfloat16, CPU, 64)
    assert isinstance(build_packed_linear(quantized("int8", (33, 64)), None, torch.bfloat16), Int8Linear)
    assert isinstance(build_packed_linear(quantized("int4", (33, 64)), None, torch.bfloat16), UnpackingLinear)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.usefixtures("native")
def test_what_gptq_stores_stays_with_torchs_kernel(group_size: int, ordered: bool) -> None:
    packed = gptq(48, group_size, ordered=ordered)
    codes = packed.codes.clone()
    assert packed_panels(packed, None, PanelMemory()) is None
    assert torch.equal(packed.codes, codes)
    linear = build_packed_linear(packed, None, torch.bfloat16)
    assert isinstance(linear, Int4Linear)
    x = random(5, packed.in_features).bfloat16()
    expected = x.float() @ dequantize(packed).T
    assert (linear(x) - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.usefixtures("native")
def test_groups_of_another_size_stay_with_torchs_kernel() -> None:
    packed = empty_packed("int4", 48, 256, 64, CPU)
    quantize_into(packed, random(48, 256) / 50)
    assert isinstance(packed, PackedInt4)
    assert packed_panels(packed, None, PanelMemory()) is None


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(128, 96), (65, 32)])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.usefixtures("native")
def test_memory_is_used_again_only_where_that_is_allowed(scheme: str, shape: tuple[int, int], in_place: bool) -> None:
    packed = quantized(scheme, shape)
    codes, weights = packed.codes.clone(), dequantize(packed)
    panels = packed_panels(packed, None, PanelMemory(), in_place=in_place)
    assert panels is not None
    if not in_place:
        assert torch.equal(packed.codes, codes)
    shared = panels.struct.panels == packed.codes.data_ptr()
    assert shared == (scheme == "int8" and in_place and shape[0] % 64 == 0)
    x = random(3, shape[1])
    expected = x @ weights.T
    assert (panels(x) - expected).norm() < 0.02 * expected.norm()


def panels_of(shape: tuple[int, int]) -> tuple[PackedInt4, PanelInt4]:
    """A matrix in rows, and the same in panels."""
    packed = quantized("int4", shape)
    assert isinstance(packed, PackedInt4)
    return packed, in_panels(packed)


@pytest.mark.parametrize("shape", [(128, 96), (65, 32), (33, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("native")
def test_panels_of_files_give_the_bits_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, panels = panels_of(shape)
    x, bias = random(5, shape[1]).to(dtype), random(shape[0], seed=1)
    linear, expected = build_packed_linear(panels, bias, dtype), build_packed_linear(packed, bias, dtype)
    assert isinstance(linear, PanelLinear)
    assert torch.equal(linear(x), expected(x))
    assert (linear.out_features, linear.code_bytes, linear.scale_bytes) == (
        shape[0],
        expected.code_bytes,
        expected.scale_bytes,
    )
    panels.panels.zero_()  # which may be a file, or the place of the next expert
    assert torch.equal(linear(x), expected(x))


@pytest.mark.parametrize("shape", [(128, 96), (33, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("without_library")
def test_without_a_library_they_are_put_into_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, panels = panels_of(shape)
    linear, expected = build_packed_linear(panels, None, dtype), build_packed_linear(packed, None, dtype)
    assert type(linear) is type(expected)
    x = random(5, shape[1]).to(dtype)
    assert torch.equal(linear(x), expected(x))
    panels.panels.zero_()
    assert torch.equal(linear(x), expected(x))


@pytest.mark.usefixtures("native")
def test_panels_that_lie_in_their_room_are_not_copied() -> None:
    packed, panels = panels_of((65, 96))
    tensors = panels.tensors()
    room = torch.full((sum(tensor.nbytes for tensor in tensors.values()) + 192,), 7, dtype=torch.uint8)
    pieces = room[192:].split([tensor.nbytes for tensor in tensors.values()])  # as far into it as in a file
    for piece, tensor in zip(pieces, tensors.values(), strict=True):
        piece.copy_(tensor.view(torch.uint8).flatten())
    before = room.clone()
    landed = PanelInt4(
        panels=pieces[0].view(panels.panels.shape),
        row_scales=pieces[1].view(torch.float32),
        out_features=65,
        in_features=96,
    )
    linear = packed_panels(landed, None, PanelMemory(room))
    assert linear is not None
    assert [linear.struct.panels, linear.struct.row_scales] == [piece.data_ptr() for piece in pieces]
    assert torch.equal(room, before)
    x = random(3, 96)
    assert torch.equal(linear(x), build_packed_linear(packed, None, torch.float32)(x))


def test_what_finds_no_room_lies_on_the_heap() -> None:
    room = torch.zeros(256, dtype=torch.uint8)
    memory = PanelMemory(room)
    tensors = [memory.take(shape, torch.uint8) for shape in ((100,), (129,), (128,), (1,))]
    offsets = [tensor.data_ptr() - room.data_ptr() for tensor in tensors]
    assert (offsets[0], offsets[2]) == (0, 128)
    assert not 0 <= offsets[1] < 256
    assert not 0 <= offsets[3] < 256


@pytest.mark.usefixtures("native")
def test_its_bytes_are_those_of_the_matrix() -> None:
    bias = torch.zeros(33, dtype=torch.bfloat16)
    for scheme in ("int8", "int4"):
        packed = quantized(scheme, (33, 64))
        panels = packed_panels(packed, bias, PanelMemory())
        assert panels is not None
        assert panels.code_bytes == packed.codes.numel() + 2 * 33
        assert panels.code_bytes + panels.scale_bytes == num_bytes(packed) + 2 * 33
    rows = room_for_panels(PanelMemory(), 33, 64)
    dense = dense_panels(rows, 33, bias)
    assert (dense.out_features, dense.code_bytes, dense.scale_bytes) == (33, 33 * 64 * 2 + 2 * 33, 0)


@pytest.mark.usefixtures("native")
def test_a_column_of_x_need_not_be_contiguous() -> None:
    panels = build_packed_linear(quantized("int8", (33, 64)), None, torch.float32)
    x = random(64, 5).t()
    assert torch.equal(panels(x), panels(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("native")
def test_an_embedding_gives_the_rows_it_multiplies_with(dtype: torch.dtype) -> None:
    packed = quantized("int8", (100, 64))
    panels = packed_panels(packed, None, PanelMemory())
    assert panels is not None
    ids = torch.tensor([[3, 99], [0, 64]]).t()[0]  # every other number
    assert torch.equal(PanelEmbedding(panels, dtype).lookup(ids), dequantize(packed)[ids].to(dtype))


def test_tensors_that_lie_in_one_piece_do_not_overlap() -> None:
    memory = PanelMemory()
    shapes = [(3, 5), (64, 64), (1, 1), (7, 33), (9 << 20, 8)]  # the last is larger than a piece
    tensors = [memory.take(shape, torch.bfloat16).fill_(number) for number, shape in enumerate(shapes)]
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert torch.equal(memory.copy(tensors[3]), tensors[3])
