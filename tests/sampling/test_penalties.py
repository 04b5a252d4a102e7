import pytest
import torch
from torch import Tensor

from ernie45.sampling.penalties import (
    SeenTokens,
    apply_frequency_penalty,
    apply_logit_bias,
    apply_presence_penalty,
    apply_repetition_penalty,
    copied,
)

CPU = torch.device("cpu")


def assert_equal(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected))


def test_logit_bias_adds_to_the_named_tokens_only() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    biased = copied(logits)
    apply_logit_bias(biased, torch.tensor([2, 0]), torch.tensor([-4.0, 0.5]))
    assert_equal(biased, [1.5, 2.0, -1.0])
    assert_equal(logits, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [(2.0, [1.5, -6.0, 0.0]), (0.5, [6.0, -1.5, 0.0])],
    ids=["above 1 lowers both signs", "below 1 raises both signs"],
)
def test_repetition_penalty_divides_positive_and_multiplies_negative(penalty: float, expected: list[float]) -> None:
    assert_equal(apply_repetition_penalty(torch.tensor([3.0, -3.0, 0.0]), penalty), expected)


def test_presence_penalty_counts_a_token_once() -> None:
    penalised = apply_presence_penalty(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 3.0]), 0.5)
    assert_equal(penalised, [1.0, 0.5, 0.5])


def test_frequency_penalty_counts_a_token_each_time() -> None:
    penalised = apply_frequency_penalty(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 3.0]), 0.5)
    assert_equal(penalised, [1.0, 0.5, -0.5])


def test_seen_tokens_are_distinct_and_prompt_tokens_count_zero() -> None:
    seen = SeenTokens([7, 3, 7], CPU)
    for token_id in (5, 3, 5):
        seen.add_to_reply(token_id)
    counts = dict(zip(seen.token_ids.tolist(), seen.reply_counts.tolist(), strict=True))
    assert counts == {7: 0.0, 3: 1.0, 5: 2.0}
