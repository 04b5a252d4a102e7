from __future__ import annotations

import pytest
import torch

from ernie45.kernels.linear import DenseLinear, packs

needs_packing = pytest.mark.skipif(
    not packs(torch.bfloat16, torch.device("cpu")), reason="this CPU has no bf16 arithmetic in oneDNN"
)


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_the_matrix_product(dtype: torch.dtype, pack: bool, num_rows: int, with_bias: bool) -> None:
    weight, x = random(70, 130, dtype=dtype, seed=1), random(num_rows, 130, dtype=dtype, seed=2)
    bias = random(70, dtype=dtype, seed=3) if with_bias else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    y = DenseLinear(weight.clone(), bias, pack=pack)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=1e-2)


@needs_packing
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("in_features", [128, 256, 1024, 3072])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(in_features: int, pack: bool) -> None:
    linear = DenseLinear(random(384, in_features, dtype=torch.bfloat16, seed=1), pack=pack)
    x = random(48, in_features, dtype=torch.bfloat16, seed=2)
    x[7] *= 1000  # an outlier row
    together = linear(x)
    for first, num_rows in [(0, 1), (3, 1), (3, 2), (5, 3), (4, 4), (2, 7), (0, 16), (6, 33)]:
        assert torch.equal(linear(x[first : first + num_rows]), together[first : first + num_rows])


@needs_packing
def test_a_packed_weight_does_not_depend_on_the_one_it_was_made_from() -> None:
    weight = random(64, 64, dtype=torch.bfloat16, seed=1)
    linear, x = DenseLinear(weight), random(4, 64, dtype=torch.bfloat16, seed=2)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)
