"""Checkpoints that Baidu or others quantised: all but GPTQ's 4-bit ones are refused before a weight is read, with the
reason and what to use instead.

The formats of the five quantised ERNIE-4.5-300B-A47B-…-Paddle releases are documented only in part
(docs/decisions/0009). A weight decoded by a wrong guess gives fluent nonsense, so there is no guessing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ernie45.checkpoint.gptq_config import read_gptq_config
from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo
from ernie45.checkpoint.packed_config import read_packed_config
from ernie45.errors import UnsupportedError

_UNQUANTISED_300B = (
    "load 'baidu/ERNIE-4.5-300B-A47B-PT' or 'baidu/ERNIE-4.5-300B-A47B-Paddle', the same model unquantised, "
    "or the smaller 'baidu/ERNIE-4.5-21B-A3B-PT'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """The message reads "<model> is <what>: <reason>"."""

    what: str
    reason: str
    hint: str = _UNQUANTISED_300B


_TWO_BIT = _Kind(
    what="quantised to 2 bits",
    reason="only its experts in layers 7 to 53 are documented, not how the 4-bit experts of layers 3 to 6 and the "
    "8-bit dense weights are packed, which may be permuted for CUTLASS",
)
_TWO_BIT_SPLIT = _Kind(
    what="quantised to 2 bits and split in advance for several GPUs",
    reason="how the files of each GPU are named and along which axes the weights are split is not documented, nor how "
    "its 4-bit and 8-bit weights are packed",
)
_FP8 = _Kind(
    what="quantised to FP8",
    reason="whether it has one scale per tensor or per 128 x 128 block is not confirmed, and with one per tensor the "
    "weights may be Hadamard-rotated, which would give wrong answers without an error",
)
_W4A8C8 = _Kind(
    what="quantised to 4-bit weights with 8-bit activations and KV cache (W4A8C8)",
    reason="which half of a byte comes first, how the weights are permuted for CUTLASS and how far their scales are "
    "stretched is not documented, and the files are made for exactly 4 GPUs",
)
_UNKNOWN = _Kind(
    what="quantised",
    reason="ernie45 does not read this format yet",
    hint="load the unquantised release of the same model, such as 'baidu/ERNIE-4.5-21B-A3B-PT', or a 4-bit GPTQ one",
)

_PUBLISHED = MappingProxyType(
    {
        "ernie-4.5-300b-a47b-2bits-paddle": _TWO_BIT,
        "ernie-4.5-300b-a47b-2bits-tp2-paddle": _TWO_BIT_SPLIT,
        "ernie-4.5-300b-a47b-2bits-tp4-paddle": _TWO_BIT_SPLIT,
        "ernie-4.5-300b-a47b-fp8-paddle": _FP8,
        "ernie-4.5-300b-a47b-w4a8c8-tp4-paddle": _W4A8C8,
    }
)
_ORGANISATIONS = ("", "baidu", "paddlepaddle")

_CONFIG_KEYS = (
    "quant_method",
    "quantization",
    "dense_quant_type",
    "moe_quant_type",
    "kv_cache_quant_type",
    "is_quantized",
    "is_moe_quantized",
)

_BY_EXPERT_TYPE = MappingProxyType(
    {"wint2": _TWO_BIT, "w4w2": _TWO_BIT, "w4a8": _W4A8C8}
    | dict.fromkeys(("fp8", "tensor_wise_fp8", "block_wise_fp8"), _FP8)
)

_TWO_BIT_TENSORS = {"super_scales", "super_scale", "code_scale", "code_zp"}
_NARROW_DTYPES = {"F8_E4M3", "F8_E5M2", "U8", "I8"}


def refuse_by_name(name: str) -> None:
    """Refuse the name of a published quantised release, full or short, in any case; others pass.

    Raises UnsupportedError.
    """
    organisation, _, short_name = name.strip().lower().rpartition("/")
    kind = _PUBLISHED.get(short_name)
    if kind is not None and organisation in _ORGANISATIONS:
        raise _refusal(name.strip(), kind)


def refuse_by_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse a config.json that says its weights are quantised; `name` is what the message calls the model.

    GPTQ weights that can be read pass. The entries may stand at the top or in `quantization_config`; one that is null,
    false or empty says nothing.

    Raises UnsupportedError, or ConfigError for a GPTQ entry of the wrong type.
    """
    if read_gptq_config(config) is not None or read_packed_config(config) is not None:
        return
    quantization = config.get("quantization_config")
    nested = quantization if isinstance(quantization, Mapping) else {}
    said = {key: nested.get(key) or config.get(key) for key in _CONFIG_KEYS}
    said = {key: value for key, value in said.items() if value}
    if said:
        raise _refusal(name, _kind_of_config(said), f"config.json: {_listing(said)}")
    if any(nested.values()) or (quantization and not nested):
        raise _refusal(name, _UNKNOWN, f"config.json: quantization_config {quantization!r:.200}")


def refuse_by_tensors(index: CheckpointIndex) -> None:
    """Refuse files with quantised tensors, which their names show, or a `.weight` in an 8-bit dtype.

    Raises UnsupportedError.
    """
    examples: dict[_Kind, TensorInfo] = {}
    for info in index.tensors.values():
        kind = _kind_of_tensor(info)
        if kind is not None:
            examples.setdefault(kind, info)
    # Most telling first: a 2-bit file also holds scales as an FP8 one has, and that one activation scales.
    for kind in (_TWO_BIT, _FP8, _W4A8C8, _UNKNOWN):
        if kind in examples:
            info = examples[kind]
            raise _refusal(str(index.folder), kind, f"{info.name!r} is {info.dtype} {list(info.shape)}")


def _kind_of_config(said: Mapping[str, object]) -> _Kind:
    """By the experts, which are 96 % of a 300B; "quantization" is often just "mix_quant"."""
    experts = said.get("moe_quant_type") or said.get("quantization")
    return _UNKNOWN if "quant_method" in said else _BY_EXPERT_TYPE.get(str(experts).lower(), _UNKNOWN)


def _kind_of_tensor(info: TensorInfo) -> _Kind | None:
    owner, _, last = info.name.rpartition(".")
    if last in _TWO_BIT_TENSORS:
        return _TWO_BIT
    if last == "weight":
        return _UNKNOWN if info.dtype in _NARROW_DTYPES else None
    if last == "activation_scale" or owner.endswith(("cachek_matmul", "cachev_matmul")):
        return _W4A8C8
    # FP8 has one scale or one per block, integers have one per output.
    if last == "weight_scale" and (math.prod(info.shape) == 1 or (len(info.shape) == 2 and min(info.shape) > 1)):
        return _FP8
    if last == "quant_weight" and info.dtype.startswith("F8_"):
        return _FP8
    return _UNKNOWN if last in ("weight_scale", "quant_weight") else None


def _listing(said: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value!r:.60}" for key, value in said.items())


def _refusal(subject: str, kind: _Kind, evidence: str = "") -> UnsupportedError:
    shown = f" ({evidence})" if evidence else ""
    return UnsupportedError(f"{subject} is {kind.what}{shown}: {kind.reason}", hint=kind.hint)
