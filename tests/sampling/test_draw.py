import math
from collections.abc import Callable

import pytest
import torch

from ernie45.errors import CorruptFileError
from ernie45.sampling.draw import check_finite, greedy_token, greedy_tokens, sampled_token
from ernie45.types.requests import Sampling

PLAIN = Sampling(temperature=1.0, top_p=1.0)
BROKEN = [
    pytest.param([1.0, math.nan, 2.0], "nan", id="NaN"),
    pytest.param([1.0, math.inf, 2.0], "inf", id="+inf"),
    pytest.param([-math.inf, -math.inf, -math.inf], "-inf", id="all -inf"),
]


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert greedy_token(torch.tensor([1.0, 3.0, 3.0])) == 1


def test_greedy_tokens_takes_each_row_within_the_tokenizer() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 9.0], [-1.0, -2.0, -math.inf, 9.0]])
    assert [best.token_id for best in greedy_tokens(logits, 3)] == [1, 0]


@pytest.mark.parametrize(
    ("uniform", "token_id"), [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 4), (1 - 2**-53, 4)]
)
def test_one_number_picks_the_token_through_the_inverse_cdf(uniform: float, token_id: int) -> None:
    # Probabilities 0, 1/4, 1/2, 0, 1/4, 0 in the order of ids.
    logits = torch.tensor([-math.inf, 0.0, math.log(2), -math.inf, 0.0, -math.inf])
    assert sampled_token(logits, PLAIN, uniform) == token_id


@pytest.mark.parametrize(("uniform", "token_id"), [(0.0, 2), (0.6, 2), (0.7, 0), (0.99, 0)])
def test_filtered_draws_share_out_the_tokens_kept(uniform: float, token_id: int) -> None:
    # top_k keeps weights 2 and 1, ranked: 2/3 for id 2, 1/3 for id 0.
    logits = torch.tensor([0.0, -5.0, math.log(2)])
    assert sampled_token(logits, Sampling(temperature=1.0, top_p=1.0, top_k=2), uniform) == token_id


@pytest.mark.parametrize(("temperature", "token_id"), [(1.0, 0), (0.5, 1), (2.0, 0)])
def test_temperature_divides_the_logits(temperature: float, token_id: int) -> None:
    # Weight of id 0 against 1 for id 1: 1/2 at temperature 1, 1/4 at 0.5, 0.71 at 2; shares 0.33, 0.2, 0.41.
    logits = torch.tensor([0.0, math.log(2)])
    sampling = Sampling(temperature=temperature, top_p=1.0)
    assert sampled_token(logits, sampling, 0.3) == token_id


@pytest.mark.parametrize(("values", "found"), BROKEN)
def test_logits_that_are_not_finite_are_refused(values: list[float], found: str) -> None:
    logits = torch.tensor(values)
    draws: list[Callable[[], object]] = [
        lambda: greedy_token(logits),
        lambda: check_finite(greedy_tokens(torch.stack([torch.zeros(3), logits]), 3)[1].logit),
        lambda: sampled_token(logits, PLAIN, 0.5),
        lambda: sampled_token(logits, Sampling(top_p=0.8), 0.5),
        lambda: sampled_token(logits, Sampling(top_k=2), 0.5),
    ]
    for draw in draws:
        with pytest.raises(CorruptFileError, match=rf"not finite \(found {found}\)") as caught:
            draw()
        assert "float32" in caught.value.hint
