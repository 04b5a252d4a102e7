"""Guesses are drawn with the numbers of the draws to come, and change none of them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from ernie45.sampling import Sampler, build_sampler
from ernie45.sampling.speculative import RandomNumbers
from ernie45.types.requests import Sampling

V = 50
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.3, "top_p": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 7, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": {3: 2.0, 4: -100.0}},
]


def sampler(**options: Any) -> Sampler:
    return build_sampler(
        Sampling(seed=5, **options), num_token_ids=V - 5, vocab_size=V, prompt_ids=[1, 2], device=torch.device("cpu")
    )


def test_numbers_come_in_the_order_of_the_seed_however_far_one_looks_ahead() -> None:
    source = random.Random(3)
    expected = [source.random() for _ in range(12)]
    numbers = RandomNumbers(3)
    assert [numbers.ahead(count) for count in (2, 0, 1)] == [expected[2], expected[0], expected[1]]
    assert [numbers.take() for _ in range(2)] == expected[:2]
    assert numbers.ahead(5) == expected[7]
    assert [numbers.take() for _ in range(10)] == expected[2:]


def test_without_a_seed_the_numbers_differ() -> None:
    assert RandomNumbers(None).ahead(0) != RandomNumbers(None).ahead(0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_guess_from_the_same_logits_is_the_draw(options: dict[str, Any]) -> None:
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(1)) * 2
    guessing = sampler(**options)
    for row in logits:
        guess = guessing.guess(row, 0)
        assert guessing(row).token_id == guess


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_guesses_leave_the_draws_as_they_were(options: dict[str, Any]) -> None:
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(2)) * 2
    plain, guessing = sampler(**options), sampler(**options)
    for step, row in enumerate(logits):
        for ahead in range(step % 4):
            guessing.guess(torch.randn(V), ahead)
        assert guessing(row) == plain(row)


def test_without_penalties_a_guess_further_ahead_is_that_draw() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(3))
    ahead = sampler(temperature=2.0, top_p=0.95)
    guesses = [ahead.guess(row, place) for place, row in enumerate(logits)]
    assert guesses == [ahead(row).token_id for row in logits]
