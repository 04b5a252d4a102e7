"""Each operation against numbers worked out by hand or a plain double-precision formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ernie45.kernels.ops import RotaryTable, attention, rms_norm, rotate, swiglu

CPU = torch.device("cpu")


def test_rms_norm_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    expected = torch.tensor([[3 / math.sqrt(12.5), 2 * 4 / math.sqrt(12.5)]])
    torch.testing.assert_close(rms_norm(x, torch.tensor([1.0, 2.0]), eps=0.0), expected)


def test_rms_norm_is_computed_in_float32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # its square overflows float16
    assert rms_norm(x, torch.ones(4096, dtype=torch.float16), eps=1e-5).tolist()[0] == [1.0] * 4096


def test_swiglu_takes_the_gate_first() -> None:
    gate, up = 2.0, 10.0
    silu = gate / (1 + math.exp(-gate))
    torch.testing.assert_close(swiglu(torch.tensor([[gate, up]])), torch.tensor([[silu * up]]))


def test_rotation_turns_adjacent_pairs() -> None:
    table = RotaryTable(head_dim=4, theta=100.0, context_tokens=8, device=CPU)
    cos, sin = table.at(torch.tensor([3]))
    x = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])  # one token, one head, two pairs
    angles = [3.0, 3.0 / math.sqrt(100.0)]
    expected = [math.cos(angles[0]), math.sin(angles[0]), math.cos(angles[1]), math.sin(angles[1])]
    torch.testing.assert_close(rotate(x, cos, sin), torch.tensor([[expected]]))


def test_rotation_keeps_products_of_equal_distance() -> None:
    table = RotaryTable(head_dim=8, theta=500000.0, context_tokens=64, device=CPU)
    query, key = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(query_at: int, key_at: int) -> float:
        rotated = [rotate(x, *table.at(torch.tensor([p]))) for x, p in ((query, query_at), (key, key_at))]
        return float((rotated[0] * rotated[1]).sum())

    assert product(10, 3) == pytest.approx(product(57, 50), abs=1e-5)
    assert product(10, 3) != pytest.approx(product(10, 4), abs=1e-3)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("num_tokens", "num_keys"), [(1, 1), (1, 9), (5, 5), (5, 9)])
def test_attention_against_the_plain_formula(num_tokens: int, num_keys: int, num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(num_tokens, 6, 8, generator=generator)
    keys, values = torch.randn(2, num_kv_heads, num_keys, 8, generator=generator)
    expected = torch.empty(num_tokens, 6, 8, dtype=torch.float64)
    for token in range(num_tokens):
        seen = num_keys - num_tokens + token + 1
        for head in range(6):
            kv_head = head * num_kv_heads // 6
            scores = keys[kv_head, :seen].double() @ query[token, head].double() / math.sqrt(8)
            expected[token, head] = scores.softmax(0) @ values[kv_head, :seen].double()
    torch.testing.assert_close(attention(query, keys, values).double(), expected.flatten(1), atol=1e-5, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


def test_attention_to_a_long_prompt_makes_no_matrix_of_all_pairs() -> None:
    keys, values = torch.randn(2, 1, 2048, 8, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        attention(torch.ones(512, 2, 8), keys, values)
    assert 0 < largest.num_bytes < 512 * 2048  # a byte a pair
