"""What a config says of GPTQ weights. Imports no torch.

The entries are those that AutoGPTQ and GPTQModel write (https://github.com/ModelCloud/GPTQModel,
quantization/config.py), which transformers' `GPTQConfig` reads as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.checkpoint.headers import read_json
from ernie45.errors import ConfigError, UnsupportedError
from ernie45.spec.values import flag

QUANTIZE_CONFIG_FILE = "quantize_config.json"

_BITS = 4
_GROUP_MULTIPLE = 32
_PACK_DTYPES = ("int32", "torch.int32")
_FORMATS = ("gptq", "gptq_v2")
_QUANTISE_AGAIN = (
    "quantise the model again with GPTQModel, to 4 bits in the format 'gptq' or 'gptq_v2', or load the unquantised "
    "release with quantization='int4'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqConfig:
    """How the 4-bit matrices of a GPTQ checkpoint are stored.

    Attributes:
        group_size: inputs that share a scale and a zero; None for all of a row.
        stores_zero_minus_one: as the format "gptq" does; "gptq_v2" stores the zeros themselves.
        is_symmetric: every zero is 8.
        reorders_inputs: a group is made of inputs that need not stand side by side (`desc_act`).
    """

    group_size: int | None
    stores_zero_minus_one: bool
    is_symmetric: bool
    reorders_inputs: bool


def with_quantize_config(config: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """`config` with the entries of quantize_config.json, where older folders have what config.json lacks.

    Raises ConfigError when that file cannot be read.
    """
    path = folder / QUANTIZE_CONFIG_FILE
    if config.get("quantization_config") or not path.is_file():
        return config
    return {**config, "quantization_config": {"quant_method": "gptq", **read_json(path)}}


def read_gptq_config(config: Mapping[str, Any]) -> GptqConfig | None:
    """What `quantization_config` in a config.json says of GPTQ weights; None where it names another method, or none.

    Raises:
        UnsupportedError: GPTQ weights that are not read: of other than 4 bits, or in another format.
        ConfigError: an entry of the wrong type.
    """
    entries = config.get("quantization_config")
    if not isinstance(entries, Mapping) or entries.get("quant_method") != "gptq":
        return None
    _refuse_what_is_not_read(entries)
    group_size = _group_size(entries)
    _refuse_overrides(entries, group_size)
    is_symmetric = flag(entries, "sym") is not False
    stores_zero_minus_one = _format(entries) == "gptq"
    if stores_zero_minus_one and not is_symmetric and not _written_by_gptqmodel(entries):
        # A zero of 0 became -1: in GPTQModel it borrows from the next in its word, in AutoGPTQ it overwrote all others.
        raise UnsupportedError(
            "config.json: asymmetric GPTQ weights in the format 'gptq' are read only if GPTQModel wrote them, and "
            "meta.quantizer does not name it: other writers stored zeros of 0 in ways that readers disagree on",
            hint=_QUANTISE_AGAIN,
        )
    return GptqConfig(
        group_size=group_size,
        stores_zero_minus_one=stores_zero_minus_one,
        is_symmetric=is_symmetric,
        reorders_inputs=flag(entries, "desc_act") is True,
    )


def _refuse_what_is_not_read(entries: Mapping[str, Any]) -> None:
    if isinstance(entries.get("bits"), bool) or entries.get("bits") != _BITS:
        raise _unsupported("bits", entries.get("bits"), "only 4 bits are read")
    if _format(entries) not in _FORMATS:
        raise _unsupported("checkpoint_format", _format(entries), "only 'gptq' and 'gptq_v2' are read")
    if str(entries.get("pack_dtype") or "int32") not in _PACK_DTYPES:
        raise _unsupported("pack_dtype", entries["pack_dtype"], "only 'int32' is read")
    for key in ("lm_head", "is_marlin_format", "adapter", "rotation"):
        if entries.get(key):
            raise _unsupported(key, entries[key], "such weights are not read")


def _format(entries: Mapping[str, Any]) -> str:
    return str(entries.get("checkpoint_format") or entries.get("format") or "gptq").lower()


def _group_size(entries: Mapping[str, Any]) -> int | None:
    value = entries.get("group_size")
    if isinstance(value, bool) or not isinstance(value, int) or value < -1 or value == 0:
        raise ConfigError(
            f"config.json: group_size is {value!r} in quantization_config", hint="it must be above 0, or -1"
        )
    if value == -1:
        return None
    if value % _GROUP_MULTIPLE:
        raise _unsupported("group_size", value, f"only multiples of {_GROUP_MULTIPLE}, and -1, are read")
    return value


def _refuse_overrides(entries: Mapping[str, Any], group_size: int | None) -> None:
    """`dynamic` maps patterns of module names to entries of their own; one that begins with "-:" leaves modules out."""
    dynamic = entries.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ConfigError(
            f"config.json: dynamic is {dynamic!r:.100} in quantization_config", hint="it must be an object"
        )
    for pattern, own in dynamic.items():
        if str(pattern).startswith("-:") or not isinstance(own, Mapping):
            continue
        if own.get("bits", _BITS) != _BITS or own.get("group_size", group_size or -1) != (group_size or -1):
            raise _unsupported("dynamic", {pattern: own}, "all matrices must have the same bits and group size")


def _written_by_gptqmodel(entries: Mapping[str, Any]) -> bool:
    meta = entries.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    named = quantizers if isinstance(quantizers, list) else [quantizers]
    return any(str(name).lower().startswith("gptqmodel:") for name in named)


def _unsupported(key: str, value: object, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"config.json: {key} is {value!r:.100} in the GPTQ quantization_config: {reason}", hint=_QUANTISE_AGAIN
    )
