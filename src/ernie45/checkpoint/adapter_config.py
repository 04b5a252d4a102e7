"""What a PEFT adapter's adapter_config.json says, read strictly. Needs no torch.

The keys are those of peft.LoraConfig: https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ernie45.checkpoint.headers import read_json
from ernie45.errors import ConfigError, UnsupportedError

CONFIG_FILE = "adapter_config.json"
MERGE_HINT = "merge it with PEFT (merge_and_unload, then save_pretrained), and load the folder that gives"

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"} | {
    "target_parameters",
    "base_model_name_or_path",
    "init_lora_weights",
    "bias",
}
# How the adapter was made, or which modules it was made for: once trained, its tensors say that.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config", "lora_dropout"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "velora_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
}
# Other ways to begin change the base model's weights too, so that the adapter does not fit the published ones.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_OFF: tuple[object, ...] = (None, False, [], {})
_MAX_PATTERN_CHARS = 200
_MAX_CHOICES = 4
_MAX_ALPHA = 1e9

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """The settings of a plain LoRA. `rank_pattern` and `alpha_pattern` map regular expressions on the end of a
    module's name to values that replace `rank` and `alpha`; `target_modules` is empty when the adapter chose them by a
    regular expression or "all-linear"."""

    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    base_model: str | None

    def rank_of(self, name: str) -> int:
        """The rank of the module (or fused parameter) `name`."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What B @ A is multiplied by: alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
        rank = self.rank_of(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_lora_settings(folder: Path) -> LoraSettings:
    """Read `adapter_config.json`. Every key is read, known to be without effect on merging, or has to be off.

    Raises:
        ConfigError: the file is missing or malformed.
        UnsupportedError: the adapter is no plain LoRA; the key that says so is named.
    """
    if (folder / "lora_config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        raise UnsupportedError(
            f"{folder} holds a lora_config.json, as Paddle's tools write it, and no {CONFIG_FILE}",
            hint="merge it with the tool that trained it, and load the merged checkpoint",
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{folder} has no {CONFIG_FILE}",
            hint="adapter= takes the folder that PEFT saved; fetch one from the Hub first",
        )
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{folder / CONFIG_FILE}: peft_type is {config.get('peft_type')!r}, and ernie45 merges LORA only",
            hint=MERGE_HINT,
        )
    for key, value in config.items():
        if key not in _READ | _WITHOUT_EFFECT and value not in _OFF:
            raise _not_plain(key, value)
    if config.get("bias", "none") != "none":
        raise _not_plain("bias", config["bias"])
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise _not_plain("init_lora_weights", config["init_lora_weights"])
    base_model = config.get("base_model_name_or_path")
    return LoraSettings(
        rank=_rank("r", config.get("r")),
        alpha=_alpha("lora_alpha", config.get("lora_alpha")),
        rank_stabilized=_flag(config, "use_rslora"),
        rank_pattern={key: _rank(f"rank_pattern[{key!r}]", value) for key, value in _pattern(config, "rank_pattern")},
        alpha_pattern={
            key: _alpha(f"alpha_pattern[{key!r}]", value) for key, value in _pattern(config, "alpha_pattern")
        },
        target_modules=_names(config, "target_modules"),
        target_parameters=_names(config, "target_parameters"),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
    )


def _by_pattern(pattern: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first expression that matches the end of `name` from a dot on, as PEFT looks it up."""
    for expression, value in pattern.items():
        if re.match(_from_a_dot(expression), name):
            return value
    return default


def _from_a_dot(expression: str) -> str:
    return rf"(.*\.)?({expression})$"


def _not_plain(key: str, value: object) -> UnsupportedError:
    return UnsupportedError(
        f"{CONFIG_FILE}: {key} is {value!r:.200}, and ernie45 merges plain LoRA without it", hint=MERGE_HINT
    )


def _malformed(key: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{CONFIG_FILE}: {key} is {value!r:.200}", hint=f"it must be {wanted}")


def _rank(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _malformed(key, value, "a whole number above 0")
    return value


def _alpha(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_ALPHA:
        raise _malformed(key, value, "a number")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _malformed(key, value, "true or false")
    return value


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key)
    if value is None or (isinstance(value, str) and key == "target_modules"):
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _malformed(key, value, "a list of names")
    return tuple(value)


def _pattern(config: Mapping[str, Any], key: str) -> list[tuple[str, object]]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _malformed(key, value, "an object that maps names to numbers")
    for expression in value:
        # Some expressions backtrack for longer than anyone waits.
        bare = re.sub(r"\\.|\[[^]]*\]", "x", expression).replace("(?", "(")
        num_choices = sum(map(bare.count, "*+?{("))
        if len(expression) > _MAX_PATTERN_CHARS or num_choices > _MAX_CHOICES or re.search(r"\)[*+?{]", bare):
            wanted = f"simpler: no repeated group, at most {_MAX_CHOICES} groups and repeats"
            raise _malformed(f"a name in {key}", expression, wanted)
        try:
            re.compile(_from_a_dot(expression))
        except (re.error, OverflowError) as error:
            raise _malformed(f"a name in {key}", expression, f"a regular expression ({error})") from error
    return list(value.items())
