"""Reading single values of a config strictly: the right type and range, or a ConfigError that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie45.errors import ConfigError


def alias(config: Mapping[str, Any], key: str, other: str) -> object:
    """The value that stands under one of two keys, or under both; None where it is absent or null in both."""
    values = [config[name] for name in (key, other) if config.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ConfigError(
            f"config.json: {key} is {values[0]!r}, but {other} is {values[1]!r}",
            hint="they name the same thing: keep the one that the weights were trained with",
        )
    return values[0] if values else None


def missing(key: str) -> ConfigError:
    return ConfigError(f"config.json: {key} is missing", hint="the file is incomplete; download it again")


def positive_int(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise missing(key)
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be a whole number above 0")
    return value


def count(config: Mapping[str, Any], key: str) -> int:
    """A number that may be 0, which it also is where the key is absent or null."""
    value = config.get(key)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0
    return positive_int(config, key)


def number(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r:.100} in the checkpoint's config", hint="it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{key} is {value!r:.100}… in the checkpoint's config", hint="it is too large") from None


def positive_float(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    # Mostly without a default: the tensors' shapes show a wrong width, but nothing would show a wrong constant.
    if config.get(key) is None:
        if default is None:
            raise missing(key)
        return default
    value = number(config, key)
    if not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be above 0")
    return value


def flag(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be true or false")
    return value


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(
            f"{key} is {value!r} in the checkpoint's config", hint="it must be a token id or a list of them"
        )
    return tuple(ids)


def token_id(config: Mapping[str, Any], key: str) -> int | None:
    ids = token_ids(config, key)
    return ids[0] if ids else None
