import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie45.sampling.filters import apply_min_p, apply_top_p, likely_tokens, rank_tokens, relative_weights
from ernie45.types.requests import Sampling


def kept_ids(logits: Tensor, sampling: Sampling, *, first_count: int = 512) -> list[int]:
    return likely_tokens(logits, float(logits.max()), sampling, first_count=first_count)[1].tolist()


def ranked_by_python(logits: Tensor) -> list[int]:
    values = logits.tolist()
    return sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))


@pytest.mark.parametrize("count", [1, 3, 60, 1000, 5000])
def test_rank_tokens_orders_ties_by_lower_id(count: int) -> None:
    # 1000 logits of 20 values: every border falls between equal ones.
    logits = torch.randint(-10, 10, (1000,), generator=torch.Generator().manual_seed(1)).float()
    ranked, token_ids = rank_tokens(logits, count)
    expected = ranked_by_python(logits)[:count]
    assert token_ids.tolist() == expected
    assert torch.equal(ranked, logits[expected])


@pytest.mark.parametrize("count", [3, 64])
def test_rank_tokens_takes_both_zeros_and_infinities(count: int) -> None:
    logits = torch.tensor([-0.0, 0.0, -math.inf, -1.0, 2.0, -0.0, 0.0, -1e-38] + [-5.0] * 56)
    assert rank_tokens(logits, count)[1].tolist() == ranked_by_python(logits)[:count]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=80),
    st.integers(1, 90),
)
@settings(max_examples=200, deadline=None)
def test_rank_tokens_agrees_with_a_plain_sort(values: list[float], count: int) -> None:
    logits = torch.tensor(values)
    assert rank_tokens(logits, count)[1].tolist() == ranked_by_python(logits)[:count]


@pytest.mark.parametrize(
    ("top_p", "num_kept"),
    # Weights 4, 2, 1, 1 are probabilities 1/2, 1/4, 1/8, 1/8: all exact in binary.
    [(0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.9, 4), (1.0, 4)],
)
def test_top_p_keeps_the_token_that_crosses_the_border(top_p: float, num_kept: int) -> None:
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    assert apply_top_p(weights, top_p, 8.0).tolist() == weights[:num_kept].tolist()


def test_top_p_is_a_share_of_the_whole_and_not_of_the_weights_given() -> None:
    weights = np.array([4.0, 2.0])
    assert apply_top_p(weights, 0.6, 8.0).tolist() == [4.0, 2.0]
    assert apply_top_p(weights, 0.9, 8.0).tolist() == [4.0, 2.0]


@pytest.mark.parametrize(("min_p", "num_kept"), [(0.0, 4), (0.2, 4), (0.25, 4), (0.26, 2), (0.5, 2), (1.0, 1)])
def test_min_p_is_a_share_of_the_best(min_p: float, num_kept: int) -> None:
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    assert apply_min_p(weights, min_p).tolist() == weights[:num_kept].tolist()


def test_relative_weights_by_hand() -> None:
    weights = relative_weights(torch.tensor([2.0, 1.0, -math.inf]), 2.0, 0.5)
    assert weights.tolist() == pytest.approx([1.0, math.exp(-2), 0.0], rel=1e-12)


def test_top_k_keeps_exactly_k_and_the_lower_ids_of_equal_ones() -> None:
    logits = torch.tensor([1.0, 5.0, 1.0, 1.0, 4.0])
    assert kept_ids(logits, Sampling(top_k=3, top_p=1.0)) == [1, 4, 0]
    assert kept_ids(logits, Sampling(top_k=9, top_p=1.0)) == [1, 4, 0, 2, 3]


def test_top_p_is_a_share_of_what_top_k_keeps() -> None:
    # Four equal tokens: each is 1/4 of all, but 1/2 of the two that top_k keeps.
    logits = torch.zeros(4)
    assert kept_ids(logits, Sampling(top_p=0.5)) == [0, 1]
    assert kept_ids(logits, Sampling(top_p=0.5, top_k=2)) == [0]


def test_min_p_applies_after_temperature() -> None:
    # A logit 1 below the best is exp(-1) = 0.37 as likely at temperature 1, exp(-2) = 0.14 at 0.5.
    logits = torch.tensor([3.0, 2.0])
    assert kept_ids(logits, Sampling(temperature=1.0, top_p=1.0, min_p=0.2)) == [0, 1]
    assert kept_ids(logits, Sampling(temperature=0.5, top_p=1.0, min_p=0.2)) == [0]


@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0], ids=["equal", "flat", "peaked"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.7, top_p=0.3, min_p=0.01),
        Sampling(temperature=1.0, top_p=1.0, min_p=0.4),
        Sampling(temperature=1.0, top_p=0.9999),
    ],
    ids=["top_p", "both", "min_p", "nearly all"],
)
def test_ranking_few_first_never_changes_the_result(sampling: Sampling, spread: float) -> None:
    logits = torch.randn(4000, generator=torch.Generator().manual_seed(3)) * spread
    best = float(logits.max())
    few = likely_tokens(logits, best, sampling, first_count=16)
    whole = likely_tokens(logits, best, sampling, first_count=4000)
    assert np.array_equal(few[0], whole[0])
    assert torch.equal(few[1], whole[1])


def test_both_ways_of_ranking_are_taken() -> None:
    flat, peaked = torch.zeros(4000), torch.zeros(4000)
    peaked[7] = 50.0
    assert len(kept_ids(flat, Sampling(top_p=0.8), first_count=16)) == 3200
    assert kept_ids(peaked, Sampling(top_p=0.8), first_count=16) == [7]
