import math
from collections.abc import Mapping
from typing import Any

import pytest

from ernie45.errors import InvalidRequestError
from ernie45.types.requests import MAX_LOGPROBS, Sampling, ThinkingLimit, TokenRequest

BAD = [
    ("temperature", -0.1, "-0.1"),
    ("temperature", math.nan, "nan"),
    ("temperature", math.inf, "inf"),
    ("temperature", "hot", "'hot'"),
    ("temperature", True, "True"),
    ("top_p", 0, "0"),
    ("top_p", 1.5, "1.5"),
    ("top_p", None, "None"),
    ("top_k", -1, "-1"),
    ("top_k", 2.5, "2.5"),
    ("top_k", True, "True"),
    ("min_p", -0.25, "-0.25"),
    ("min_p", 1.25, "1.25"),
    ("min_p", "0.1", "'0.1'"),
    ("repetition_penalty", 0, "0"),
    ("repetition_penalty", -1.0, "-1"),
    ("repetition_penalty", math.inf, "inf"),
    ("presence_penalty", 2.5, "2.5"),
    ("presence_penalty", -2.5, "-2.5"),
    ("presence_penalty", math.nan, "nan"),
    ("frequency_penalty", 2.5, "2.5"),
    ("frequency_penalty", -2.5, "-2.5"),
    ("frequency_penalty", [1], "[1]"),
    ("logit_bias", {-3: 1.0}, "-3"),
    ("logit_bias", {"12": 1.0}, "'12'"),
    ("logit_bias", {12: 101}, "101"),
    ("logit_bias", {12: -100.5}, "-100.5"),
    ("logit_bias", {12: math.nan}, "nan"),
    ("seed", -1, "-1"),
    ("seed", 2**64, str(2**64)),
    ("seed", 1.0, "1.0"),
    ("logprobs", -1, "-1"),
    ("logprobs", MAX_LOGPROBS + 1, str(MAX_LOGPROBS + 1)),
    ("logprobs", True, "True"),
]


@pytest.mark.parametrize(("name", "value", "shown"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_a_bad_value_is_named_with_what_to_do(name: str, value: object, shown: str) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(InvalidRequestError) as caught:
        Sampling(**options)
    assert name in caught.value.message
    assert caught.value.message.endswith(f" not {shown}")
    assert caught.value.hint


def test_a_bad_bias_names_its_token() -> None:
    with pytest.raises(InvalidRequestError, match=r"logit_bias\[12\] must be at least -100 and at most 100"):
        Sampling(logit_bias={3: 1.0, 12: 101})


def test_logit_bias_must_map_ids_to_numbers() -> None:
    options: dict[str, Any] = {"logit_bias": [(1, 2.0)]}
    with pytest.raises(InvalidRequestError, match="logit_bias must map") as caught:
        Sampling(**options)
    assert "logit_bias={" in caught.value.hint


GOOD: list[dict[str, Any]] = [
    {"temperature": 0},
    {"top_p": 1},
    {"top_p": 1e-6},
    {"top_k": 0},
    {"min_p": 0},
    {"min_p": 1},
    {"repetition_penalty": 0.5},
    {"presence_penalty": -2},
    {"frequency_penalty": 2},
    {"logit_bias": {0: -100, 5: 100.0}},
    {"seed": 0},
    {"seed": 2**64 - 1},
    {"logprobs": 0},
    {"logprobs": MAX_LOGPROBS},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_the_ends_of_each_range_are_allowed(options: Mapping[str, Any]) -> None:
    sampling = Sampling(**options)
    for name, value in options.items():
        assert getattr(sampling, name) == value


def test_unset_options_are_the_published_defaults() -> None:
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_p) == (0.8, 0.8)
    assert sampling.repetition_penalty == 1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0, 0)
    assert (sampling.top_k, sampling.min_p, dict(sampling.logit_bias)) == (0, 0, {})
    assert sampling.seed is None
    assert sampling.logprobs is None


def test_greedy_is_temperature_zero() -> None:
    assert Sampling(temperature=0).greedy
    assert not Sampling(temperature=0.01).greedy


def test_a_request_is_greedy_unless_told_otherwise() -> None:
    assert TokenRequest(token_ids=(1, 2)).sampling.greedy


@pytest.mark.parametrize("budget", [-1, 2.5, True, "10"])
def test_a_thinking_budget_is_a_number_of_tokens(budget: Any) -> None:
    assert ThinkingLimit(max_tokens=0, end_token_id=5, closing_ids=(5,)).max_tokens == 0
    with pytest.raises(InvalidRequestError, match="thinking_budget must be") as caught:
        ThinkingLimit(max_tokens=budget, end_token_id=5, closing_ids=(5,))
    assert caught.value.hint
