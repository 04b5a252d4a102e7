import math

import pytest
import torch

from ernie45.errors import CorruptFileError
from ernie45.sampling.logprobs import token_logprob


def test_the_best_come_first_and_equal_ones_by_lower_id() -> None:
    # Weights 1, 2, 1, 4 of 8.
    logits = torch.tensor([0.0, math.log(2), 0.0, math.log(4)])
    result = token_logprob(logits, 1, 3)
    assert result.token_id == 1
    assert result.logprob == pytest.approx(math.log(1 / 4), abs=1e-6)
    assert [token_id for token_id, _ in result.top] == [3, 1, 0]
    assert [logprob for _, logprob in result.top] == pytest.approx(
        [math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)], abs=1e-6
    )
    assert dict(result.top)[1] == result.logprob


def test_all_tokens_sum_to_one() -> None:
    logits = 5 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    result = token_logprob(logits, 0, 20)
    assert sorted(token_id for token_id, _ in result.top) == list(range(20))
    assert math.fsum(math.exp(logprob) for _, logprob in result.top) == pytest.approx(1.0, abs=1e-6)


def test_a_small_vocabulary_gives_what_it_has_and_zero_gives_none() -> None:
    assert len(token_logprob(torch.zeros(3), 0, 20).top) == 3
    assert token_logprob(torch.zeros(3), 0, 0).top == ()


def test_nan_is_refused() -> None:
    with pytest.raises(CorruptFileError, match="nan"):
        token_logprob(torch.tensor([0.0, math.nan]), 0, 1)
