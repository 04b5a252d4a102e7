import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.errors import InvalidRequestError
from ernie45.sampling import Sampler, build_sampler
from ernie45.types.requests import Sampling

V = 8


def sampler_for(*, num_token_ids: int = V, prompt_ids: Sequence[int] = (), **options: Any) -> Sampler:
    return build_sampler(
        Sampling(**options),
        num_token_ids=num_token_ids,
        vocab_size=V,
        prompt_ids=prompt_ids,
        device=torch.device("cpu"),
    )


def draw(sampler: Sampler, logits: Tensor, times: int) -> list[int]:
    return [sampler(logits).token_id for _ in range(times)]


def row(*values: float) -> Tensor:
    return torch.tensor([*values, *[-30.0] * (V - len(values))])


def test_presence_penalty_makes_greedy_move_on_once() -> None:
    # 3.0 falls to 1.5 once and stays: 2.0 wins, falls to 0.5; then 1.5 wins for good.
    assert draw(sampler_for(temperature=0, presence_penalty=1.5), row(3.0, 2.0), 5) == [0, 1, 0, 0, 0]


def test_frequency_penalty_grows_with_each_use() -> None:
    # 3.0 -> 2.25 -> 1.5 < 2.0 -> 1.25 < 1.5 -> 0.75.
    assert draw(sampler_for(temperature=0, frequency_penalty=0.75), row(3.0, 2.0), 5) == [0, 0, 1, 0, 1]


def test_repetition_penalty_covers_prompt_and_reply() -> None:
    # With id 0 in the prompt 3.0 / 2 = 1.5 from the start; 2.0 / 2 = 1.0 after the first draw.
    logits = row(3.0, 2.0)
    assert draw(sampler_for(temperature=0, repetition_penalty=2.0, prompt_ids=[0, 0]), logits, 3) == [1, 0, 0]
    assert draw(sampler_for(temperature=0, repetition_penalty=2.0), logits, 3) == [0, 1, 0]


def test_presence_and_frequency_penalties_leave_the_prompt_alone() -> None:
    sampler = sampler_for(temperature=0, presence_penalty=2.0, frequency_penalty=2.0, prompt_ids=[0, 0])
    assert draw(sampler, row(3.0, 2.0), 1) == [0]


def test_bias_comes_before_the_penalties_and_repetition_before_presence() -> None:
    # Id 0 at the second step: (1 + 7) / 2 - 2 = 2 loses to the 2.5 of id 1.
    # Bias last would give 1 / 2 - 2 + 7 = 5.5, presence first (1 + 7 - 2) / 2 = 3: both would win.
    sampler = sampler_for(temperature=0, logit_bias={0: 7.0}, repetition_penalty=2.0, presence_penalty=2.0)
    assert draw(sampler, row(1.0, 2.5), 2) == [0, 1]


def test_logit_bias_forces_and_forbids() -> None:
    logits = row(3.0, 2.0, 1.0)
    assert draw(sampler_for(temperature=0, logit_bias={2: 100}), logits, 1) == [2]
    assert draw(sampler_for(temperature=0, logit_bias={0: -100}), logits, 1) == [1]
    assert set(draw(sampler_for(temperature=1, top_p=1, logit_bias={0: -100}), logits, 200)) == {1, 2}


def test_logit_bias_outside_the_vocabulary_names_the_id_and_the_size() -> None:
    with pytest.raises(InvalidRequestError, match=r"token id 8\b.* 8 ids") as caught:
        sampler_for(logit_bias={7: 1.0, 8: 1.0})
    assert "from 0 to 7" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 5.0, "top_p": 1.0},
        {"temperature": 5.0, "top_p": 0.99},
        {"temperature": 5.0, "top_p": 1.0, "top_k": 7},
        {"temperature": 5.0, "repetition_penalty": 0.5, "prompt_ids": [6]},
    ],
    ids=["greedy", "temperature", "top_p", "top_k", "penalty"],
)
def test_ids_above_the_tokenizer_are_never_drawn(options: dict[str, Any]) -> None:
    logits = torch.zeros(V)
    logits[5:] = 50.0
    sampler = sampler_for(num_token_ids=5, logit_bias={5: 100, 7: 100}, **options)
    assert set(draw(sampler, logits, 300)) <= set(range(5))


def test_a_seed_gives_the_same_draws_whatever_else_is_drawn() -> None:
    logits = torch.zeros(V)
    alone = draw(sampler_for(seed=7), logits, 40)
    first, second, other = sampler_for(seed=7), sampler_for(seed=7), sampler_for(seed=8)
    together = []
    for _ in range(40):
        torch.rand(3)
        other(logits)
        together.append(first(logits).token_id)
    assert together == alone == draw(second, logits, 40)
    assert draw(sampler_for(seed=8), logits, 40) != alone


def test_without_a_seed_each_sampler_draws_its_own_and_the_global_one_stays() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = {tuple(draw(sampler_for(), torch.zeros(V), 40)) for _ in range(3)}
    assert len(draws) == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "num_draws", "probabilities"),
    [
        ({"top_p": 1.0}, 20_000, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, 4_000, [4 / 7, 3 / 7]),
        ({"top_p": 1.0, "top_k": 3}, 4_000, [4 / 9, 3 / 9, 2 / 9]),
        ({"top_p": 1.0, "min_p": 0.4}, 4_000, [4 / 9, 3 / 9, 2 / 9]),
    ],
    ids=["temperature", "top_p", "top_k", "min_p"],
)
def test_draws_follow_the_probabilities(options: dict[str, Any], num_draws: int, probabilities: list[float]) -> None:
    logits = torch.full((V,), -math.inf)
    logits[:4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    counts = Counter(draw(sampler_for(temperature=1.0, seed=11, **options), logits, num_draws))
    assert set(counts) == set(range(len(probabilities)))
    chi_square = sum(
        (counts[token_id] - num_draws * share) ** 2 / (num_draws * share)
        for token_id, share in enumerate(probabilities)
    )
    # The 0.999 quantile of chi-square with 3 degrees of freedom, the most here.
    assert chi_square < 16.27


def test_logprobs_are_those_of_the_raw_logits_and_of_the_whole_vocabulary() -> None:
    # Weights 4, 2, 1, 1 of 8, with id 2 forced by a bias and ids from 3 unknown to the tokenizer.
    logits = torch.full((V,), -math.inf)
    logits[:4] = torch.tensor([4.0, 2.0, 1.0, 1.0]).log()
    sampler = sampler_for(
        temperature=0.1,
        logit_bias={2: 100},
        logprobs=4,
        num_token_ids=3,
        repetition_penalty=3.0,
        prompt_ids=[0],
    )
    drawn = sampler(logits)
    assert drawn.token_id == 2
    assert drawn.logprob is not None
    assert drawn.logprob.token_id == 2
    assert drawn.logprob.logprob == pytest.approx(math.log(1 / 8), abs=1e-6)
    assert [token_id for token_id, _ in drawn.logprob.top] == [0, 1, 2, 3]
    assert math.fsum(math.exp(logprob) for _, logprob in drawn.logprob.top) == pytest.approx(1.0, abs=1e-6)


def test_logprobs_come_only_where_asked() -> None:
    assert sampler_for(temperature=0)(row(1.0)).logprob is None
    asked = sampler_for(temperature=0, logprobs=0)(row(1.0)).logprob
    assert asked is not None
    assert asked.top == ()


def test_the_logits_given_are_never_changed() -> None:
    logits = torch.randn(V, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    choices: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 1.0}, {"top_p": 0.5}, {"top_k": 2}]
    adjustments: list[dict[str, Any]] = [
        {},
        {"logit_bias": {1: 5.0}},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 1.0, "prompt_ids": [1]},
    ]
    for options in [choice | adjustment for choice in choices for adjustment in adjustments]:
        draw(sampler_for(**options, logprobs=3), logits, 3)
        assert torch.equal(logits, before), options


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e308])
def test_extreme_temperatures_still_draw(temperature: float) -> None:
    logits = row(3.0, 2.0)
    drawn = draw(sampler_for(temperature=temperature, top_p=0.9, seed=1), logits, 50)
    assert (set(drawn) == {0}) == (temperature < 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "seed": 1}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": 0, "logprobs": 0}, False),
        ({"temperature": 0, "logit_bias": {1: 1.0}}, False),
        ({"temperature": 0, "repetition_penalty": 1.1}, False),
        ({"temperature": 0, "presence_penalty": 0.1}, False),
        ({"temperature": 0, "frequency_penalty": 0.1}, False),
    ],
)
def test_plain_greedy_is_greedy_and_nothing_else(options: dict[str, Any], expected: bool) -> None:
    assert sampler_for(**options).is_plain_greedy is expected


def test_a_sampler_made_in_inference_mode_works_outside_and_back() -> None:
    with torch.inference_mode():
        sampler = sampler_for(temperature=0, frequency_penalty=0.75, logit_bias={1: 1.0})
        first = sampler(row(3.0, 1.0)).token_id
    second = sampler(row(3.0, 1.0)).token_id
    assert [first, second] == [0, 0]
    with torch.inference_mode():
        assert sampler(row(3.0, 1.0)).token_id == 1


def test_a_token_that_is_taken_counts_as_drawn() -> None:
    sampler = sampler_for(temperature=0, presence_penalty=1.5, logprobs=1)
    drawn = sampler.take(row(3.0, 2.0), 0)
    assert drawn.token_id == 0
    assert drawn.logprob == sampler_for(temperature=0, logprobs=1)(row(3.0, 2.0)).logprob
    assert draw(sampler, row(3.0, 2.0), 3) == [1, 0, 0]
