"""The vision-language models' config.json: the published form, which the Paddle files share, and transformers'.

The published form (`ernie4_5_moe_vl`) keeps the text model's keys at the top, with a pair, text and vision, where the
two banks of experts differ. transformers (`ernie4_5_vl_moe`) nests them in `text_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ernie45.errors import ConfigError
from ernie45.spec.keys import (
    NEUTRAL,
    NEUTRAL_OF_TOWER,
    NEUTRAL_OF_VISION,
    READ,
    READ_OF_EXPERTS,
    READ_OF_TOWER,
    READ_OF_VISION,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_OF_TOWER,
    WITHOUT_EFFECT_OF_VISION,
    check_neutral,
    unknown_keys,
)
from ernie45.spec.shapes import ExpertSpec, ModelSpec, VisionSpec
from ernie45.spec.text import parse_experts, parse_trunk
from ernie45.spec.values import alias, missing, positive_float, positive_int

VISION_MODEL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe")
_IN_PAIRS = ("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_layer_end_index")


def parse_vision_language(config: Mapping[str, Any]) -> ModelSpec:
    """Read a vision-language model's config in either form.

    Raises:
        ConfigError: a missing or senseless value, or a neutral key with another value.
    """
    flat = _flat(config)
    tower = flat.get("vision_config")
    if not isinstance(tower, Mapping):
        raise missing("vision_config")
    neutral = {**NEUTRAL, **NEUTRAL_OF_VISION}
    check_neutral(flat, neutral)
    check_neutral(tower, NEUTRAL_OF_TOWER, "vision_config.")
    num_time_frequencies, num_frequencies, flat = _time_frequencies(flat)
    text_experts = _bank(flat, 0)
    vision_experts = replace(_bank(flat, 1), num_shared_experts=0)
    if (text_experts.first_layer, text_experts.last_layer) != (vision_experts.first_layer, vision_experts.last_layer):
        raise ConfigError(
            f"config.json: text has experts in layers {text_experts.first_layer} to {text_experts.last_layer}, pictures"
            f" in {vision_experts.first_layer} to {vision_experts.last_layer}",
            hint="ernie45 runs models that have both in the same layers; please report the checkpoint",
        )
    if text_experts.num_experts != vision_experts.num_experts:  # the correction bias is one tensor with a row for each
        raise ConfigError(
            f"config.json: moe_num_experts is {text_experts.num_experts} for text and {vision_experts.num_experts} for"
            " pictures",
            hint="ernie45 runs models with as many of both; please report the checkpoint",
        )
    spec = parse_trunk(
        flat,
        model_type="ernie4_5_moe_vl",
        experts=text_experts,
        unknown_keys=(
            *unknown_keys(
                flat, READ, READ_OF_EXPERTS, READ_OF_VISION, neutral, WITHOUT_EFFECT, WITHOUT_EFFECT_OF_VISION
            ),
            *unknown_keys(tower, READ_OF_TOWER, NEUTRAL_OF_TOWER, WITHOUT_EFFECT_OF_TOWER, where="vision_config."),
        ),
    )
    if num_frequencies not in (None, spec.head_dim // 2):
        raise ConfigError(
            f"config.json: rope_parameters.mrope_section holds {num_frequencies} frequencies, and a head of"
            f" {spec.head_dim} has {spec.head_dim // 2}",
            hint="the file is damaged or not an ERNIE 4.5 config",
        )
    return replace(spec, vision=_vision(flat, tower, vision_experts, num_time_frequencies))


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the text model's keys at the top, whichever form it has."""
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, Mapping):
        raise ConfigError(f"config.json: text_config is {text!r:.100}", hint="it must be an object")
    nested = {key: value for key, value in text.items() if key != "model_type" and value is not None}
    return {**nested, **{key: value for key, value in config.items() if key != "text_config"}}


def _time_frequencies(flat: Mapping[str, Any]) -> tuple[int, int | None, Mapping[str, Any]]:
    """How many frequencies turn with time, how many there are if it is said, and the config without transformers' way
    of saying so."""
    parameters = flat.get("rope_parameters")
    if not isinstance(parameters, Mapping) or "mrope_section" not in parameters:
        return positive_int(flat, "freq_allocation", default=20), None, flat
    section = parameters["mrope_section"]
    if (
        not isinstance(section, list)
        or len(section) != 3
        or not all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in section)
        or section[0] != section[1]
    ):
        raise ConfigError(
            f"config.json: rope_parameters.mrope_section is {section!r}",
            hint="it must hold the numbers of frequencies for height, width (as many) and time",
        )
    if flat.get("freq_allocation") not in (None, section[2]):
        raise ConfigError(
            f"config.json: freq_allocation is {flat['freq_allocation']!r}, but mrope_section ends in {section[2]}",
            hint="they name the same thing: keep the one that the weights were trained with",
        )
    others = {key: value for key, value in parameters.items() if key != "mrope_section"}
    return section[2], sum(section), {**flat, "rope_parameters": others}


def _bank(flat: Mapping[str, Any], place: int) -> ExpertSpec:
    """The experts of text (0) or pictures (1)."""
    own = dict(flat)
    for key in _IN_PAIRS:
        value = flat.get(key)
        if isinstance(value, list):
            if len(value) != 2:
                raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be a pair: text, pictures")
            own[key] = value[place]
    experts = parse_experts(own | _layers(flat))
    if experts is None:
        raise missing("moe_num_experts")
    return experts


def _layers(flat: Mapping[str, Any]) -> dict[str, int]:
    """The layers with experts out of transformers' `mlp_layer_types`, as first, last and interval."""
    kinds = flat.get("mlp_layer_types")
    if kinds is None:
        return {}
    num_layers = positive_int(flat, "num_hidden_layers")
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise ConfigError(
            f"config.json: mlp_layer_types is {kinds!r:.100}", hint='it must say "dense" or "sparse" of each layer'
        )
    sparse = [index for index, kind in enumerate(kinds) if kind == "sparse"]
    for interval in range(1, num_layers + 1):
        if sparse and sparse == [i for i in range(sparse[0], sparse[-1] + 1) if (i + 1) % interval == 0]:
            return {
                "moe_layer_start_index": sparse[0],
                "moe_layer_end_index": sparse[-1],
                "moe_layer_interval": interval,
            }
    raise ConfigError(
        f"config.json: mlp_layer_types has experts in the layers {sparse}, which are not evenly spaced",
        hint="ernie45 runs models whose layers with experts follow one interval; please report the checkpoint",
    )


def _vision(
    flat: Mapping[str, Any], tower: Mapping[str, Any], experts: ExpertSpec, num_time_frequencies: int
) -> VisionSpec:
    width_key = "vision_config.hidden_size"
    hidden_size = positive_int({width_key: alias(tower, "hidden_size", "embed_dim")}, width_key)
    if flat.get("pixel_hidden_size") not in (None, hidden_size):
        raise ConfigError(
            f"config.json: pixel_hidden_size is {flat['pixel_hidden_size']!r}, but vision_config has {hidden_size}",
            hint="the file is damaged or not an ERNIE 4.5 config",
        )
    # The published form gives the width of the tower's MLP as a multiple, and never its epsilon.
    default_width = hidden_size * positive_int(tower, "mlp_ratio", default=4)
    rope = tower.get("rope_parameters")
    if rope is not None and (
        not isinstance(rope, Mapping)
        or rope.get("rope_type") not in ("axial", "default")
        or not set(rope) <= {"rope_type", "rope_theta"}
    ):
        raise ConfigError(
            f"config.json: vision_config.rope_parameters is {rope!r:.100}",
            hint="ernie45 computes rope_type 'axial' with rope_theta alone",
        )
    return VisionSpec(
        num_layers=positive_int(tower, "depth"),
        hidden_size=hidden_size,
        intermediate_size=positive_int(tower, "intermediate_size", default=default_width),
        num_heads=positive_int(tower, "num_heads"),
        num_channels=positive_int(tower, "in_channels", default=3),
        patch_size=positive_int(tower, "patch_size", default=14),
        spatial_merge_size=_merge_size(flat, tower, "spatial"),
        temporal_merge_size=_merge_size(flat, tower, "temporal"),
        norm_eps=positive_float(tower, "rms_norm_eps", default=1e-6),
        rope_theta=positive_float(rope or {}, "rope_theta", default=10000.0),
        num_time_frequencies=num_time_frequencies,
        experts=experts,
    )


def _merge_size(flat: Mapping[str, Any], tower: Mapping[str, Any], axis: str) -> int:
    """It stands at the top, in the tower's config, or in both."""
    key, inner = f"{axis}_conv_size", f"vision_config.{axis}_merge_size"
    both = {key: flat.get(key), inner: tower.get(f"{axis}_merge_size")}
    return positive_int({key: alias(both, key, inner)}, key, default=2)
