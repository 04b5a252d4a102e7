"""Which code runs which `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from ernie45.backends.base import Backend, BuildOptions
from ernie45.backends.text import build_text
from ernie45.backends.vision_language import build_vision_language
from ernie45.checkpoint.read import TensorSource
from ernie45.errors import InvalidRequestError
from ernie45.spec import ModelSpec, parse_spec


class BuildBackend(Protocol):
    """Builds a backend from a checkpoint's tensors.

    It is called twice: first with everything placed on torch's "meta" device and a source that only checks names and
    shapes, so that whatever is missing shows before anything is read, then with the real ones. Every stored tensor must
    be asked for.
    """

    def __call__(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> Backend: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How one `model_type` is read and run. `follows_options` says whether `build` quantises as its preset says, and
    puts parts on several devices."""

    parse_spec: Callable[[Mapping[str, Any]], ModelSpec]
    build: BuildBackend
    follows_options: bool


_TEXT = Architecture(parse_spec=parse_spec, build=build_text, follows_options=True)
_VISION = Architecture(parse_spec=parse_spec, build=build_vision_language, follows_options=True)
_OURS: Mapping[str, Architecture] = MappingProxyType(
    {"ernie4_5": _TEXT, "ernie4_5_moe": _TEXT, "ernie4_5_moe_vl": _VISION, "ernie4_5_vl_moe": _VISION}
)
_registered: dict[str, Architecture] = {}


def register(model_type: str, *, parse_spec: Callable[[Mapping[str, Any]], ModelSpec], build: BuildBackend) -> None:
    """Have checkpoints whose config.json says `model_type` read and run by other code, before ernie45's own.

    `parse_spec` turns the config into a ModelSpec, `build` makes the backend (see `BuildBackend`). It is asked for
    everything on one device, with the preset "none".

    Raises:
        InvalidRequestError: the model type is registered already.
    """
    if model_type in _registered:
        raise InvalidRequestError(
            f"model_type {model_type!r} is registered already",
            hint="register each model_type once, at import",
        )
    _registered[model_type] = Architecture(parse_spec=parse_spec, build=build, follows_options=False)


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The code for a config: what was registered for its `model_type`, else ours (which refuses what it cannot run)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return _TEXT
    return _registered.get(model_type) or _OURS.get(model_type, _TEXT)
