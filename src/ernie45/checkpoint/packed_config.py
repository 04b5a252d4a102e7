"""What a config says of matrices in our own packed format. Imports no torch.

The format: docs/packed-format.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ernie45.errors import ConfigError, InvalidRequestError, UnsupportedError
from ernie45.presets import Part, QuantPreset, Scheme

FORMAT_VERSION = 2

_METHOD = "ernie45"
_STORED = (None, "int8", "int4")
_FETCH_AGAIN = "the folder is damaged or was changed by hand: save or fetch it again"


def packed_entries(preset: QuantPreset) -> dict[str, Any]:
    """The `quantization_config` of a folder that is packed with this preset.

    Raises UnsupportedError for a preset of bitsandbytes', whose matrices have no place in files.
    """
    for scheme in (preset.experts, preset.linear):
        if scheme not in _STORED:
            raise UnsupportedError(
                f"the preset {preset.name!r} stores matrices as {scheme!r}, which is not written to files",
                hint=f"keep the original and load it with quantization={preset.name!r}, or save 'int8' or 'int4'",
            )
    parts = {"experts": preset.experts, "linear": preset.linear, "embedding": preset.embedding}
    return {"quant_method": _METHOD, "format_version": FORMAT_VERSION, "preset": {"name": preset.name, **parts}}


def read_packed_config(config: Mapping[str, Any]) -> QuantPreset | None:
    """The preset that a config.json says its files are packed with; None where it names another method, or none.

    Raises:
        UnsupportedError: a newer version of the format.
        ConfigError: an entry that no version has.
    """
    entries = config.get("quantization_config")
    if not isinstance(entries, Mapping) or entries.get("quant_method") != _METHOD:
        return None
    version = entries.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ConfigError(f"config.json: format_version is {version!r} in quantization_config", hint=_FETCH_AGAIN)
    if version > FORMAT_VERSION:
        raise UnsupportedError(
            f"the folder was written by a newer version of ernie45: its packed format is {version}, and this version "
            f"reads up to {FORMAT_VERSION}",
            hint="upgrade ernie45, or save the original again with this version",
        )
    preset = entries.get("preset")
    if not isinstance(preset, Mapping) or preset.keys() != {"name", "experts", "linear", "embedding"}:
        raise ConfigError(f"config.json: preset is {preset!r:.200} in quantization_config", hint=_FETCH_AGAIN)
    name, experts, linear = preset["name"], preset["experts"], preset["linear"]
    if not isinstance(name, str) or experts not in _STORED or linear not in _STORED:
        raise ConfigError(f"config.json: preset is {dict(preset)!r:.200} in quantization_config", hint=_FETCH_AGAIN)
    try:
        return QuantPreset(name=name, experts=experts, linear=linear, embedding=preset["embedding"])
    except InvalidRequestError as error:
        raise ConfigError(f"config.json: {error.message}", hint=_FETCH_AGAIN) from error


def matrix_scheme(preset: QuantPreset, modules: Iterable[str], in_features: int) -> Scheme | None:
    """How a preset has the matrix of these -PT modules stored, which a build reads as one."""
    return preset.scheme(_part_of(next(iter(modules))), in_features)


def _part_of(module: str) -> Part:
    if module == "model.embed_tokens":
        return "embedding"
    if module == "lm_head":
        return "head"
    return "routed_experts" if ".mlp.experts." in module else "attention"
