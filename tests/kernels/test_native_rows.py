"""A row's bits are its own: whatever stands beside it, and however many threads there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ernie45.kernels.library import set_threads
from ernie45.kernels.native import Kernels
from tests.kernels.panel_matrices import DTYPES, SCHEMES, Bank, Matrix, Mlp, Norm, Router, choice, random

NUM_ROWS = 200
# Of rows that run together: below a tile, tiles with a rest, and about a block of 96.
COUNTS = (1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 64, 95, 96, 97)
HIDDEN, WIDTH, VOCAB_SIZE = 320, 192, 130
Run = Callable[[Kernels, slice], tuple[Tensor, ...]]


def rows(dtype: torch.dtype) -> Tensor:
    """The fourth of them is an outlier, and the sixth is not finite."""
    x = random(NUM_ROWS, HIDDEN, seed=9) * 2
    x[3] *= 1e6
    x[3, 7] *= 1e6
    x[5, 11] = torch.nan
    return x.to(dtype)


def runs(scheme: str, dtype: torch.dtype) -> dict[str, Run]:
    """What runs on some of the rows, by name."""
    x, norm, router = rows(dtype), Norm(HIDDEN), Router(7, HIDDEN, 3, correction=True)
    matrix = Matrix.draw(scheme, VOCAB_SIZE, HIDDEN, bias=True)
    mlp = Mlp.draw((scheme, scheme), HIDDEN, WIDTH, bias=True)
    bank = Bank([Mlp.draw((scheme, scheme), HIDDEN, 64, seed=i) for i in range(7)])
    chosen, shares = choice(NUM_ROWS, 7, 3)

    def linear(native: Kernels, some: slice) -> tuple[Tensor, ...]:
        return (native.linear(matrix.linear.struct, x[some]),)

    def head(native: Kernels, some: slice) -> tuple[Tensor, ...]:
        return (native.head(norm.struct, matrix.linear.struct, x[some]),)

    def route(native: Kernels, some: slice) -> tuple[Tensor, ...]:
        return native.route(norm.struct, router.struct, x[some])

    def dense(native: Kernels, some: slice) -> tuple[Tensor, ...]:
        y = x[some].clone()
        native.mlp(norm.struct, mlp.struct, y)
        return (y,)

    def experts(native: Kernels, some: slice) -> tuple[Tensor, ...]:
        y = x[some].clone()
        native.experts(norm.struct, bank.table, mlp.struct, chosen[some], shares[some], y)
        return (y,)

    return {"linear": linear, "head": head, "route": route, "mlp": dense, "experts": experts}


def bits(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """NaN equals itself as bits."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64}
    return [tensor.view(kinds[tensor.dtype]) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_alone_and_among_others(each_set: Kernels, scheme: str, dtype: torch.dtype) -> None:
    for name, run in runs(scheme, dtype).items():
        together = bits(run(each_set, slice(None)))
        for count in COUNTS:
            parts = [bits(run(each_set, slice(first, first + count))) for first in range(0, NUM_ROWS, count)]
            for whole, pieces in zip(together, zip(*parts, strict=True), strict=True):
                assert torch.equal(torch.cat(pieces), whole), (name, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_number_of_threads(native: Kernels, scheme: str, dtype: torch.dtype) -> None:
    for name, run in runs(scheme, dtype).items():
        for some in (slice(0, 1), slice(0, 7), slice(None)):
            found = []
            for num_threads in (1, 2, 3, 7):
                set_threads(num_threads)
                found.append(bits(run(native, some)))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other)), name
