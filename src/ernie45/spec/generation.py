"""What generation_config.json sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie45.errors import ConfigError, InvalidRequestError
from ernie45.spec.values import token_ids
from ernie45.types.requests import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What generation_config.json sets for calls that leave an option out; the published values where it is silent."""

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_token_ids: tuple[int, ...] = ()


def parse_generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """Read generation_config.json. `do_sample: false` means greedy, whatever temperature stands beside it.

    Raises:
        ConfigError: a value that no call could use.
    """
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    values: dict[str, Any] = {name: config[name] for name in (*names, "top_k") if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    if values.get("top_k") == -1:  # some writers' way to say that every token is kept
        values["top_k"] = 0
    try:
        Sampling(**values)
    except InvalidRequestError as error:
        raise ConfigError(f"generation_config.json: {error.message}", hint=error.hint) from error
    return GenerationDefaults(**values, eos_token_ids=token_ids(config, "eos_token_id"))
