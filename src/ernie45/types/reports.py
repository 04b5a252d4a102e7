"""What loading did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredTensor:
    """A stored tensor that was not read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What was read from a checkpoint folder. Every stored tensor was read or stands in `ignored`.

    `unknown_config_keys` are keys of config.json that ernie45 does not know; they may or may not matter.
    """

    folder: str
    num_tensors: int
    weight_bytes: int
    load_seconds: float
    device: str
    dtype: str
    ignored: tuple[IgnoredTensor, ...] = ()
    unknown_config_keys: tuple[str, ...] = ()
