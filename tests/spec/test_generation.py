"""generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie45.errors import ConfigError
from ernie45.spec import parse_generation_defaults


def test_the_published_generation_config(shared_data: Path) -> None:
    config = json.loads((shared_data / "ERNIE-4.5-0.3B-PT" / "generation_config.json").read_text())
    defaults = parse_generation_defaults(config)
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.8, 0.8, 0, 0.0)
    assert (defaults.repetition_penalty, defaults.presence_penalty, defaults.frequency_penalty) == (1.0, 0.0, 0.0)
    assert defaults.eos_token_ids == (2,)


def test_generation_defaults_are_the_published_ones_where_the_file_is_silent() -> None:
    defaults = parse_generation_defaults({"top_p": None, "max_length": 100})
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (0.8, 0.8, 0, 1.0)
    assert defaults.eos_token_ids == ()


def test_generation_defaults_of_the_file() -> None:
    entries = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "eos_token_id": [2, 9],
    }
    defaults = parse_generation_defaults(entries)
    values = {name: getattr(defaults, name) for name in entries if name != "eos_token_id"}
    assert values == {name: value for name, value in entries.items() if name != "eos_token_id"}
    assert defaults.eos_token_ids == (2, 9)


def test_do_sample_false_is_greedy_whatever_the_temperature() -> None:
    assert parse_generation_defaults({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert parse_generation_defaults({"do_sample": True, "temperature": 0.7}).temperature == 0.7


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("temperature", -0.5), ("top_p", 2), ("top_p", True), ("top_k", 2.5)]
)
def test_nonsense_in_generation_config_is_an_error_at_loading(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        parse_generation_defaults({key: value})
    assert str(value) in caught.value.message
    assert caught.value.hint
