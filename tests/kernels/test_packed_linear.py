"""Products with quantised matrices against the same weights in float32, and rows that do not depend on each other."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from ernie45 import ErnieModel
from ernie45.kernels.linear import Linear
from ernie45.kernels.packed_linear import Int4Linear, Int8Linear, UnpackingLinear, build_packed_linear
from ernie45.quantization.packed import Packed, PackedInt4, dequantize, empty_packed, num_bytes, pack_int4
from ernie45.quantization.quantize import quantize_into, round_int8
from ernie45.testing import tasks

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}

# Out, in, and what multiplies; the kernel's blocks of rows are whole, with a rest, and less than one.
SHAPES = [
    ("int8", (33, 35), Int8Linear),
    ("int8", (1, 1), Int8Linear),
    ("int8", (130, 64), Int8Linear),
    ("int4", (128, 8192), Int4Linear),
    ("int4", (80, 96), Int4Linear),
    ("int4", (16, 32), Int4Linear),
    ("int4", (33, 160), UnpackingLinear),
    ("int4", (1, 32), UnpackingLinear),
]


@pytest.fixture(autouse=True)
def torchs_products(without_library: None) -> None:
    """What is tested here serves where the native kernels do not (`test_panels.py`)."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(scheme: str, shape: tuple[int, int]) -> Packed:
    packed = empty_packed(scheme, *shape, 32, torch.device("cpu"))
    quantize_into(packed, random(*shape) / 50)
    return packed


def gptq(out_features: int, group_size: int, *, num_groups: int = 4, ordered: bool = True) -> PackedInt4:
    """What a GPTQ file has: scales in float16, zeros of its own, and maybe another order of the inputs."""
    draw = torch.Generator().manual_seed(0)
    in_features = group_size * num_groups
    codes = torch.randint(0, 16, (out_features, in_features), generator=draw, dtype=torch.uint8)
    return PackedInt4(
        codes=pack_int4(codes, group_size),
        scales=(torch.rand(out_features, num_groups, generator=draw) / 100).half(),
        zeros=torch.randint(0, 16, (out_features, num_groups), generator=draw, dtype=torch.uint8),
        input_order=torch.randperm(in_features, generator=draw).int() if ordered else None,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def rounded_rows(x: Tensor) -> Tensor:
    codes, scales = round_int8(x.float())
    return codes * scales[:, None]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize(("scheme", "shape", "kind"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_multiplies_with_what_the_codes_stand_for(
    dtype: torch.dtype, scheme: str, shape: tuple[int, int], kind: type, num_rows: int, with_bias: bool
) -> None:
    packed = quantized(scheme, shape)
    x = (random(num_rows, shape[1], seed=1) * 30).to(dtype)
    bias = random(shape[0], seed=2).to(dtype) if with_bias else None
    linear = build_packed_linear(packed, bias, dtype)
    assert isinstance(linear, kind)
    y = linear(x)
    expected = (rounded_rows(x) if scheme == "int8" else x.float()) @ dequantize(packed).T
    expected += 0 if bias is None else bias.float()
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert relative_error(y, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("out_features", "group_size", "kind"),
    [(48, 128, Int4Linear), (64, 96, Int4Linear), (50, 128, UnpackingLinear), (48, 16, UnpackingLinear)],
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_multiplies_with_what_gptq_stores(
    dtype: torch.dtype, out_features: int, group_size: int, kind: type, ordered: bool
) -> None:
    packed = gptq(out_features, group_size, ordered=ordered)
    x, bias = random(5, packed.in_features, seed=1).to(dtype), random(out_features, seed=2).to(dtype)
    linear = build_packed_linear(packed, bias, dtype)
    assert isinstance(linear, kind)
    y = linear(x)
    assert y.dtype == dtype
    assert relative_error(y, x.float() @ dequantize(packed).T + bias.float()) < TOLERANCES[dtype]


def linears(dtype: torch.dtype) -> list[Linear]:
    own = [build_packed_linear(quantized(scheme, shape), None, dtype) for scheme, shape, _ in SHAPES]
    return [*own, build_packed_linear(gptq(48, 128), None, dtype), build_packed_linear(gptq(50, 128), None, dtype)]


def in_features(linear: Linear) -> int:
    if isinstance(linear, Int4Linear):
        return 2 * linear.codes.shape[1]
    assert isinstance(linear, Int8Linear | UnpackingLinear)
    return linear.packed.in_features


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_outlier_leaves_the_rows_beside_it_as_they_are(dtype: torch.dtype) -> None:
    for linear in linears(dtype):
        x = random(9, in_features(linear), seed=1).to(dtype)
        with_outlier = x.clone()
        with_outlier[4] *= 1000
        y, beside = linear(x), linear(with_outlier)
        others = torch.arange(9) != 4
        assert torch.equal(beside[others], y[others])
        assert not torch.equal(beside[4], y[4])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("scheme", "shape"), [("int8", (130, 64)), ("int4", (128, 8192)), ("int4", (80, 96))])
def test_a_row_has_the_same_bits_alone(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = build_packed_linear(quantized(scheme, shape), None, dtype)
    x = random(70, shape[1], seed=1).to(dtype)
    together = linear(x)
    for first, num_rows in [(0, 1), (3, 2), (5, 3), (2, 7), (6, 33)]:
        assert torch.equal(linear(x[first : first + num_rows]), together[first : first + num_rows])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    for linear in linears(dtype):
        y = linear(torch.empty(0, in_features(linear), dtype=dtype))
        assert (y.shape, y.dtype) == ((0, linear.out_features), dtype)


def test_its_bytes_are_those_of_the_packed_matrix() -> None:
    for packed in (quantized("int8", (33, 35)), quantized("int4", (80, 96)), gptq(48, 128), gptq(50, 128)):
        linear = build_packed_linear(packed, torch.zeros(packed.out_features), torch.float32)
        assert linear.code_bytes == packed.codes.numel() + 4 * packed.out_features
        assert linear.code_bytes + linear.scale_bytes == num_bytes(packed) + 4 * packed.out_features


def test_a_model_in_float16_and_int4_answers() -> None:
    with ErnieModel.from_pretrained(
        "ernie45/tiny-dense", quantization="int4", dtype="float16", device="cpu", progress=False
    ) as model:
        for item in tasks("reverse", 3, seed=0, split="test"):
            assert model.chat(item.messages, temperature=0).text == item.answer


def test_unpacking_holds_some_rows_at_a_time() -> None:
    """Each block of unpacked rows is gone before the next is made."""

    class Watched:
        out_features, in_features = 40, 1 << 18  # four rows to a block

        def __init__(self) -> None:
            self.blocks: list[weakref.ref[Tensor]] = []

        def rows(self, start: int, stop: int) -> Tensor:
            assert not [block for block in self.blocks if block() is not None]
            block = torch.full((stop - start, self.in_features), float(start))
            self.blocks.append(weakref.ref(block))
            return block

    packed = Watched()
    y = UnpackingLinear(packed, None)(torch.ones(1, packed.in_features))  # type: ignore[arg-type]
    assert len(packed.blocks) == 10
    assert y[0, ::4].tolist() == [start * packed.in_features for start in range(0, 40, 4)]
