"""What a checkpoint's config.json says about the mathematics, strictly read.

Config keys come in classes (`keys`): read, neutral at one value, without effect, unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie45.errors import ConfigError
from ernie45.spec.generation import GenerationDefaults, parse_generation_defaults
from ernie45.spec.shapes import DTYPE_NAMES, DtypeName, ExpertSpec, ModelSpec, VisionSpec
from ernie45.spec.text import TEXT_MODEL_TYPES, parse_text
from ernie45.spec.vision import VISION_MODEL_TYPES, parse_vision_language

__all__ = [
    "DTYPE_NAMES",
    "DtypeName",
    "ExpertSpec",
    "GenerationDefaults",
    "ModelSpec",
    "VisionSpec",
    "parse_generation_defaults",
    "parse_spec",
]


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a model's config, in any of its writers' forms.

    Raises:
        ConfigError: another model type, a missing or senseless value, or a key that asks for other mathematics.
    """
    model_type = config.get("model_type")
    if model_type in TEXT_MODEL_TYPES:
        return parse_text(config)
    if model_type in VISION_MODEL_TYPES:
        return parse_vision_language(config)
    known = ", ".join(repr(name) for name in (*TEXT_MODEL_TYPES, *VISION_MODEL_TYPES))
    raise ConfigError(
        f"config.json: model_type {model_type!r} is not ERNIE 4.5",
        hint=f"ernie45 runs model_type {known}; check that the folder holds the model you mean",
    )
