"""Rounding to int8 and int4: how near, the same bytes however the work is cut, and values at the edges of float32."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ernie45.quantization.packed import Packed, PackedInt4, PackedInt8, dequantize, empty_packed, num_bytes, unpack_int4
from ernie45.quantization.quantize import quantize_into, round_int8

CPU = torch.device("cpu")
SCHEMES = ["int8", "int4"]
TINY_MODELS = Path(__file__).parents[2] / "src/ernie45/assets/tiny"


def quantized(weight: Tensor, scheme: str) -> Packed:
    packed = empty_packed(scheme, weight.shape[0], weight.shape[1], 32, CPU)
    for tensor in packed.tensors().values():
        tensor.view(torch.uint8).fill_(0x55)
    quantize_into(packed, weight)
    return packed


def same(left: Packed, right: Packed) -> bool:
    return all(torch.equal(tensor, right.tensors()[name]) for name, tensor in left.tensors().items())


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    return float((approximation - weight).norm() / weight.norm())


def q4_0(weight: Tensor) -> Tensor:
    """llama.cpp's Q4_0, 18 bytes for 32 weights: d = (value of largest magnitude) / -8 as float16, code = trunc(w / d
    + 8.5), at most 15 (https://github.com/ggml-org/llama.cpp, quantize_row_q4_0_ref)."""
    groups = weight.reshape(-1, 32)
    largest = groups[torch.arange(len(groups)), groups.abs().argmax(dim=1)]
    scale = (largest / -8)[:, None]
    codes = (groups / scale + 8.5).trunc().clamp(max=15)
    return ((codes - 8) * scale.half().float()).view_as(weight)


def normal(num_rows: int = 256, num_columns: int = 2560) -> Tensor:
    return 0.02 * torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))


def laplace() -> Tensor:
    uniform = torch.rand(256, 2560, generator=torch.Generator().manual_seed(0)) - 0.5
    return -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999))


def student() -> Tensor:
    normals = torch.randn(6, 256, 2560, generator=torch.Generator().manual_seed(0))
    return 0.02 * normals[0] / normals[1:].square().mean(dim=0).sqrt()


def outliers() -> Tensor:
    """A value of 20 standard deviations in each row, and an input whose weights are all eight times as large."""
    weight = normal()
    weight[torch.arange(256), (torch.arange(256) * 997) % 2560] = 0.4
    weight[:, 1000] *= 8
    return weight


@pytest.mark.parametrize("draw", [normal, laplace, student, outliers])
def test_int4_is_nearer_than_q4_0_with_fewer_bits(draw: Callable[[], Tensor]) -> None:
    weight = draw()
    packed = quantized(weight, "int4")
    assert 8 * num_bytes(packed) / weight.numel() < 4.27 < 8 * 18 / 32
    limit = 0.98 if draw is outliers else 0.965
    assert relative_error(weight, dequantize(packed)) < limit * relative_error(weight, q4_0(weight))


def test_int4_error_on_normal_weights() -> None:
    weight = normal()
    assert relative_error(weight, dequantize(quantized(weight, "int4"))) < 0.0818


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-vl"])
def test_int4_is_nearer_than_q4_0_on_every_matrix_of_a_tiny_model(name: str) -> None:
    tensors = load_file(TINY_MODELS / name / "model.safetensors")
    matrices = {
        key: tensor.float()
        for key, tensor in tensors.items()
        if key.endswith("proj.weight") and tensor.shape[-1] % 32 == 0
    }
    assert matrices
    for key, weight in matrices.items():
        error = relative_error(weight, dequantize(quantized(weight, "int4")))
        assert error < relative_error(weight, q4_0(weight)), key


def test_int8_error_is_half_a_step_at_most() -> None:
    weight = normal()
    packed = quantized(weight, "int8")
    assert isinstance(packed, PackedInt8)
    steps = (dequantize(packed) - weight) / packed.scales[:, None]
    assert steps.abs().max() < 0.50001
    assert torch.equal(packed.codes.int().abs().amax(dim=1), torch.full((256,), 127, dtype=torch.int32))
    torch.testing.assert_close(packed.scales, weight.abs().amax(dim=1) / 127)


def test_round_int8_leaves_its_argument_and_agrees_with_quantize_into() -> None:
    weight = normal(8, 96)
    before = weight.clone()
    codes, scales = round_int8(weight)
    assert torch.equal(weight, before)
    assert same(PackedInt8(codes=codes, scales=scales), quantized(weight, "int8"))


def test_int8_is_symmetric() -> None:
    weight = normal(64, 96)
    packed, mirrored = quantized(weight, "int8"), quantized(-weight, "int8")
    assert torch.equal(packed.codes, -mirrored.codes)
    assert torch.equal(packed.scales, mirrored.scales)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_row_alone_gives_the_same_bytes(scheme: str, dtype: torch.dtype) -> None:
    weight = normal(1000, 1088).to(dtype)  # several threads' blocks, the last one shorter
    together = quantized(weight, scheme)
    for row in (0, 1, 239, 240, 241, 999):
        alone = quantized(weight[row : row + 1], scheme)
        for name, tensor in together.tensors().items():
            assert torch.equal(alone.tensors()[name], tensor[row : row + 1]), (name, row)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_gives_what_the_same_numbers_in_float32_give(scheme: str) -> None:
    weight = normal(16, 320).bfloat16()
    assert same(quantized(weight, scheme), quantized(weight.float(), scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_view_gives_what_its_copy_gives(scheme: str, dtype: torch.dtype) -> None:
    weight = normal(320, 64).to(dtype)
    for view in (weight.t(), weight[::2], weight[:, 32:], weight[:, ::2]):
        assert same(quantized(view, scheme), quantized(view.contiguous(), scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_threads_at_once(scheme: str) -> None:
    weight = normal(64, 2560)
    expected = quantized(weight, scheme)
    with ThreadPoolExecutor(4) as pool:
        assert all(same(expected, packed) for packed in pool.map(lambda _: quantized(weight, scheme), range(8)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_alone_it_starts_no_threads(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(0))
    expected = quantized(weight, scheme)
    monkeypatch.setattr("ernie45.quantization.quantize.ThreadPoolExecutor", None)
    alone = empty_packed(scheme, 1100, 1024, 32, CPU)
    quantize_into(alone, weight, alone=True)
    assert same(alone, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_number_of_torch_threads(scheme: str) -> None:
    weight = normal(1000, 1088)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantized(weight, scheme)
        torch.set_num_threads(3)
        assert same(alone, quantized(weight, scheme))
    finally:
        torch.set_num_threads(before)


def test_the_order_of_adding_does_not_matter() -> None:
    """Scales are chosen by sums over a group. A processor adds in an order of its own; another order of the columns
    stands for that."""
    weight = normal(512, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    packed, shuffled = quantized(weight, "int4"), quantized(weight[:, order], "int4")
    assert isinstance(packed, PackedInt4)
    assert isinstance(shuffled, PackedInt4)
    assert torch.equal(packed.scales, shuffled.scales)
    assert torch.equal(packed.row_scales, shuffled.row_scales)  # type: ignore[arg-type]  # both are ours
    assert torch.equal(unpack_int4(packed.codes, 32)[:, order], unpack_int4(shuffled.codes, 32))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme: str) -> None:
    weight = normal(6, 96)
    weight[1] = 0
    weight[2, 32:64] = 0
    weight[3] = -0.0
    approximation = dequantize(quantized(weight, scheme))
    assert not approximation[[1, 3]].any()
    assert not approximation[2, 32:64].any()
    assert approximation[[0, 2, 4, 5]].any(dim=1).all()


def test_a_group_far_below_its_row_becomes_zeros() -> None:
    weight = normal(2, 96)
    weight[0, :32] *= 1e-6
    packed = quantized(weight, "int4")
    assert isinstance(packed, PackedInt4)
    assert packed.scales[0].bool().tolist() == [False, True, True]
    assert not dequantize(packed)[0, :32].any()
    assert (unpack_int4(packed.codes, 32)[0, :32] == 8).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lone_value_is_kept(sign: int) -> None:
    weight = torch.zeros(2, 96)
    weight[0, 40] = sign * 3.7
    weight[1, 95] = sign * 1e-3
    for scheme in SCHEMES:
        torch.testing.assert_close(dequantize(quantized(weight, scheme)), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("magnitude", [1e37, 3e-30, 1e-35, 1e-37, 1e-38, 3e-39, 1e-42, 1.4e-45])
def test_scales_are_finite_at_the_edges_of_float32(scheme: str, magnitude: float) -> None:
    weight = normal(16, 128) / 0.1 * magnitude
    packed = quantized(weight, scheme)
    approximation = dequantize(packed)
    assert approximation.isfinite().all()
    assert packed.tensors()["scales" if scheme == "int8" else "row_scales"].isfinite().all()
    largest = float(weight.abs().max())
    assert float((approximation - weight).abs().max()) <= max(largest / 12, 127 * torch.finfo(torch.float32).tiny)
    if magnitude > 1e-35:
        assert relative_error(weight.double(), approximation.double()) < 0.085


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_finite_for_the_largest_numbers(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    weight = torch.full((2, 64), limit, dtype=dtype)
    weight[0, ::2] = -limit
    for scheme in SCHEMES:
        packed = quantized(weight, scheme)
        assert all(tensor.isfinite().all() for tensor in packed.tensors().values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32),
        min_size=1,
        max_size=3,
    )
)
def test_every_value_is_within_a_step(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    packed = quantized(weight, "int4")
    assert isinstance(packed, PackedInt4)
    approximation = dequantize(packed)
    assert approximation.isfinite().all()
    largest = weight.abs().amax(dim=1, keepdim=True)
    assert ((approximation - weight).abs() <= 0.2 * largest + 1e-35).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_damaged_values_give_no_warning(scheme: str) -> None:
    weight = normal(4, 64)
    weight[1, 3], weight[2, 40], weight[3, :2] = torch.nan, torch.inf, torch.tensor([-torch.inf, torch.inf])
    assert same(quantized(weight[:1], scheme), first_row(quantized(weight, scheme)))


def first_row(packed: Packed) -> Packed:
    return type(packed)(**{name: tensor[:1] for name, tensor in packed.tensors().items()})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_does_no_arithmetic(scheme: str) -> None:
    """Its threads would wait for one another after each operation, on busy processors a hundred times as long as the
    work takes."""

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    packed, weight = empty_packed(scheme, 64, 320, 32, CPU), normal(64, 320).bfloat16()
    with Operations():  # type: ignore[no-untyped-call]  # untyped in torch
        quantize_into(packed, weight)
    assert names <= {"aten::detach", "aten::alias", "aten::view"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scratch_does_not_grow_with_the_matrix(scheme: str) -> None:
    def peak_bytes(num_rows: int) -> int:
        weight = torch.zeros(num_rows, 1024, dtype=torch.bfloat16)
        packed = empty_packed(scheme, num_rows, 1024, 32, CPU)
        tracemalloc.start()
        try:
            quantize_into(packed, weight)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    limit = 4 * 2**20 * torch.get_num_threads()
    assert 2**20 < peak_bytes(1024) < limit
    assert peak_bytes(16384) < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_onto_a_gpu(scheme: str) -> None:
    weight = normal()
    packed = empty_packed(scheme, 256, 2560, 32, torch.device("cuda:0"))
    quantize_into(packed, weight)
    assert same(quantized(weight, scheme), type(packed)(**{k: v.cpu() for k, v in packed.tensors().items()}))
