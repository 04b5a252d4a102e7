"""Products, lookups and panels of the native kernels on each instruction set, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie45.kernels.native import Kernels
from tests.kernels.panel_matrices import DTYPES, SCHEMES, Matrix, Norm, random

# Out, in, rows: panels with one output, all but one, all, one more; rows about the kernels' tiles and blocks.
SHAPES = [
    (1, 32, 1),
    (1, 4096, 3),
    (63, 64, 2),
    (64, 96, 7),
    (65, 160, 17),
    (64, 2080, 5),
    (200, 256, 97),
    (200, 4096, 12),
    (130, 288, 200),
    (2100, 96, 5),  # several panels a task
]


def assert_near(y: Tensor, expected: Tensor, size: Tensor) -> None:
    """As near as sums in float32 of numbers of this size are, and y's dtype."""
    steps = 2.0**-8 if y.dtype == torch.bfloat16 else 2.0**-23
    assert bool(((y.double() - expected).abs() <= steps * expected.abs() + 1e-5 * size).all())


def int8_product(matrix: Matrix, x: Tensor) -> Tensor:
    """Bit by bit: sums of integers, two scales, the bias."""
    assert matrix.packed is not None
    scales = (x.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
    codes = (x.float() * (1 / scales)).round()
    sums = (codes.double() @ matrix.packed.codes.double().T).float()
    y = sums * (scales * matrix.packed.scales)
    return (y if matrix.bias is None else y + matrix.bias).to(x.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products(each_set: Kernels, scheme: str, shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    out_features, in_features, num_rows = shape
    matrix = Matrix.draw(scheme, out_features, in_features, bias=bias)
    x = (random(num_rows, in_features, seed=9) * 3).to(dtype)
    y = each_set.linear(matrix.linear.struct, x)
    assert (y.dtype, y.shape) == (dtype, (num_rows, out_features))
    assert_near(y, matrix.product(x), matrix.size(x))
    if scheme == "int8":
        assert torch.equal(y, int8_product(matrix, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_with_numbers_of_every_size(each_set: Kernels, scheme: str, dtype: torch.dtype) -> None:
    matrix = Matrix.draw(scheme, 65, 128, bias=True)
    x = random(9, 128, seed=9)
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0
    x[4] = -0.0
    x[5, 7] = 1e9
    x[6] *= 1e-4
    x[:, 40] *= 300
    x[7, ::2] = 0
    x[8] = 127
    x = x.to(dtype)
    y = each_set.linear(matrix.linear.struct, x)
    assert_near(y, matrix.product(x), matrix.size(x))
    assert matrix.bias is not None
    assert torch.equal(y[3], matrix.bias.to(dtype))
    assert torch.equal(y[4], matrix.bias.to(dtype))
    if scheme == "int8":
        assert torch.equal(y, int8_product(matrix, x))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_shows_in_its_row_only(
    each_set: Kernels, scheme: str, dtype: torch.dtype, wrong: float
) -> None:
    matrix = Matrix.draw(scheme, 65, 128)
    x = random(9, 128, seed=9).to(dtype)
    damaged = x.clone()
    damaged[4, 37] = wrong
    y, beside = (each_set.linear(matrix.linear.struct, rows) for rows in (x, damaged))
    others = torch.arange(9) != 4
    assert torch.equal(beside[others], y[others])
    assert not bool(beside[4].isfinite().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("offset", [1, 3, 7])
def test_rows_that_begin_anywhere(each_set: Kernels, offset: int, scheme: str, dtype: torch.dtype) -> None:
    matrix = Matrix.draw(scheme, 70, 96)
    x = random(7, 96, seed=9).to(dtype)
    room = torch.full((offset + x.numel() + 9,), torch.nan, dtype=dtype)
    moved = room[offset : offset + x.numel()].view(x.shape)
    moved.copy_(x)
    assert torch.equal(each_set.linear(matrix.linear.struct, moved), each_set.linear(matrix.linear.struct, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("vocab_size", "hidden", "num_rows"), [(65, 32, 1), (1000, 256, 5), (63, 1056, 98)])
def test_heads(each_set: Kernels, vocab_size: int, hidden: int, num_rows: int, scheme: str, dtype: torch.dtype) -> None:
    matrix, norm = Matrix.draw(scheme, vocab_size, hidden, bias=True), Norm(hidden)
    x = (random(num_rows, hidden, seed=9) * 7).to(dtype)
    logits = each_set.head(norm.struct, matrix.linear.struct, x)
    assert (logits.dtype, logits.shape) == (torch.float32, (num_rows, vocab_size))
    expected = matrix.product(norm(x))
    # A number of norm(x) may be rounded to its other neighbour.
    assert (logits.double() - expected).abs().max() < 5e-3 * expected.abs().max()
    assert (logits.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("vocab_size", [1, 64, 300])
def test_lookups(each_set: Kernels, vocab_size: int, scheme: str, dtype: torch.dtype) -> None:
    matrix = Matrix.draw(scheme, vocab_size, 96)
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    rows = each_set.lookup(matrix.linear.struct, ids, dtype)
    table = matrix.weights.float()
    if matrix.packed is not None:
        table = matrix.packed.codes.float() * matrix.packed.scales[:, None]
    assert rows.dtype == dtype
    assert torch.equal(rows, table[ids].to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_rows(native: Kernels, scheme: str) -> None:
    matrix, norm = Matrix.draw(scheme, 70, 96), Norm(96)
    for dtype in DTYPES:
        x = torch.empty((0, 96), dtype=dtype)
        assert native.linear(matrix.linear.struct, x).shape == (0, 70)
        assert native.head(norm.struct, matrix.linear.struct, x).shape == (0, 70)
        assert native.lookup(matrix.linear.struct, torch.empty(0, dtype=torch.int64), dtype).shape == (0, 96)


@pytest.mark.parametrize(("num_panels", "num_dwords"), [(1, 1), (1, 8), (3, 16), (2, 40), (5, 333)])
@pytest.mark.parametrize("flip", [0, 0x80])
def test_dwords_of_a_panels_rows_lie_side_by_side(native: Kernels, num_panels: int, num_dwords: int, flip: int) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(256, (num_panels * 64, num_dwords * 4), dtype=torch.uint8, generator=draw)
    expected = (rows ^ flip).view(num_panels, 64, num_dwords, 4).transpose(1, 2).contiguous()
    native.make_panels(rows, flip=flip)
    assert torch.equal(rows.flatten(), expected.flatten())
