"""The checkpoints ernie45 knows by name: what they are and how large, without network, files or torch."""

from __future__ import annotations

import copy
import difflib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ernie45.families import FAMILIES, THINKING_21B, HyperParameter
from ernie45.parameters import ParameterCount, count_parameters
from ernie45.spec import GenerationDefaults, ModelSpec, parse_spec

Kind = Literal["base", "instruct", "thinking"]
Modality = Literal["text", "vision-language"]
Format = Literal["torch", "paddle"]
Precision = Literal["bf16", "fp8", "W4A8", "2-bit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """One checkpoint that loads by name. All numbers come from its hyper-parameters; its files, once there, win.

    Attributes:
        name: the Hub id, "baidu/…", or "ernie45/…" when it is `built_in`.
        family: the checkpoints of one shape, such as "21B-A3B".
        kind: "base" completes text, "instruct" answers messages, "thinking" reasons before it answers.
        modality: "text", or "vision-language" where it also sees images and video.
        format: who wrote the files: "torch" (the -PT and -Thinking releases) or "paddle".
        precision: of the stored weights; "bf16" has router and correction bias in float32.
        total_params: without the MTP layers, which only speculative decoding uses.
        active_params: what one text token goes through (`ParameterCount.active`), also of a model that sees pictures.
        weight_bytes: the weights as loaded unquantised, without MTP: bfloat16, router and correction bias in float32.
            For a quantised release that is the size of the same model in bf16.
        disk_bytes: the weights as stored, with MTP layers where the release carries them. A tied head that a Paddle
            release may store once more is not counted.
        disk_bytes_approximate: whether `disk_bytes` rests on anything but a published file or total.
        context_tokens: the longest prompt and reply together.
        generation_defaults: the published sampling options, but for stop ids; None where they are not known.
        built_in: whether the files are part of this package.
        hyper_parameters: the fields of config.json in the published dialect, each with its source.
        parameters: the parameters by part.
    """

    name: str
    family: str
    kind: Kind
    modality: Modality
    format: Format
    precision: Precision
    total_params: int
    active_params: int
    weight_bytes: int
    disk_bytes: int
    disk_bytes_approximate: bool
    context_tokens: int
    generation_defaults: GenerationDefaults | None
    built_in: bool = False
    hyper_parameters: tuple[HyperParameter, ...] = field(repr=False, compare=False)
    parameters: ParameterCount = field(repr=False, compare=False)

    @property
    def short_name(self) -> str:
        """The name without its organisation, such as "ERNIE-4.5-0.3B-PT"."""
        return self.name.partition("/")[2]

    @property
    def config(self) -> dict[str, Any]:
        """The hyper-parameters as config.json has them."""
        return {parameter.name: copy.deepcopy(parameter.value) for parameter in self.hyper_parameters}

    @property
    def spec(self) -> ModelSpec:
        """The shape of the model."""
        return parse_spec(self.config)


def _entry(
    name: str,
    family: str,
    kind: Kind,
    format: Format,
    precision: Precision = "bf16",
    *,
    generation: GenerationDefaults | None = None,
    but: Mapping[str, HyperParameter] | None = None,
    seen: bool = False,
    disk_bytes: int | None = None,
) -> ModelInfo:
    """`but` holds hyper-parameters other than the family's; `seen` says that all stored tensors are known."""
    fields = {**FAMILIES[family], **(but or {})}
    config = {key: parameter.value for key, parameter in fields.items()}
    spec = parse_spec(config)
    parameters = count_parameters(spec)
    return ModelInfo(
        name=name,
        family=family,
        kind=kind,
        modality="text" if spec.vision is None else "vision-language",
        format=format,
        precision=precision,
        total_params=parameters.total,
        active_params=parameters.active,
        weight_bytes=parameters.stored_bytes,
        disk_bytes=disk_bytes or parameters.stored_bytes + 2 * parameters.mtp,
        disk_bytes_approximate=not seen,
        context_tokens=spec.max_context_tokens,
        generation_defaults=generation,
        built_in=name.startswith("ernie45/"),
        hyper_parameters=tuple(fields.values()),
        parameters=parameters,
    )


# generation_config.json of 0.3B-Base and of the tiny models; what the model card of 300B recommends.
_08 = GenerationDefaults(temperature=0.8, top_p=0.8)

# Stored sizes of the quantised releases: 2Bits as its paper says, the others worked out: all linear layers but the
# head at 1 byte (FP8), or routed experts at half a byte and the other layers at 1 (W4A8), the rest in bf16.
_2BITS_BYTES, _W4A8_BYTES, _FP8_BYTES = 89 * 10**9, 157 * 10**9, 301 * 10**9

CATALOGUE: tuple[ModelInfo, ...] = (
    _entry("ernie45/tiny-dense", "tiny-dense", "instruct", "torch", generation=_08, seen=True),
    _entry("ernie45/tiny-moe", "tiny-moe", "thinking", "torch", generation=_08, seen=True),
    _entry("ernie45/tiny-vl", "tiny-vl", "instruct", "torch", generation=_08, seen=True),
    _entry("baidu/ERNIE-4.5-0.3B-PT", "0.3B", "instruct", "torch", seen=True),
    _entry("baidu/ERNIE-4.5-0.3B-Paddle", "0.3B", "instruct", "paddle"),
    _entry("baidu/ERNIE-4.5-0.3B-Base-PT", "0.3B", "base", "torch", generation=_08, seen=True),
    _entry("baidu/ERNIE-4.5-0.3B-Base-Paddle", "0.3B", "base", "paddle", generation=_08),
    _entry("baidu/ERNIE-4.5-21B-A3B-PT", "21B-A3B", "instruct", "torch"),
    _entry("baidu/ERNIE-4.5-21B-A3B-Paddle", "21B-A3B", "instruct", "paddle"),
    _entry("baidu/ERNIE-4.5-21B-A3B-Base-PT", "21B-A3B", "base", "torch"),
    _entry("baidu/ERNIE-4.5-21B-A3B-Base-Paddle", "21B-A3B", "base", "paddle"),
    _entry("baidu/ERNIE-4.5-21B-A3B-Thinking", "21B-A3B", "thinking", "torch", but=THINKING_21B, seen=True),
    _entry("baidu/ERNIE-4.5-300B-A47B-PT", "300B-A47B", "instruct", "torch", generation=_08),
    _entry("baidu/ERNIE-4.5-300B-A47B-Paddle", "300B-A47B", "instruct", "paddle", generation=_08),
    _entry("baidu/ERNIE-4.5-300B-A47B-Base-PT", "300B-A47B", "base", "torch"),
    _entry("baidu/ERNIE-4.5-300B-A47B-Base-Paddle", "300B-A47B", "base", "paddle"),
    _entry(
        "baidu/ERNIE-4.5-300B-A47B-FP8-Paddle", "300B-A47B", "instruct", "paddle", "fp8", disk_bytes=_FP8_BYTES
    ),
    _entry(
        "baidu/ERNIE-4.5-300B-A47B-W4A8C8-TP4-Paddle", "300B-A47B", "instruct", "paddle", "W4A8",
        disk_bytes=_W4A8_BYTES,
    ),
    _entry(
        "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle", "300B-A47B", "instruct", "paddle", "2-bit", disk_bytes=_2BITS_BYTES
    ),
    _entry(
        "baidu/ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle", "300B-A47B", "instruct", "paddle", "2-bit",
        disk_bytes=_2BITS_BYTES,
    ),
    _entry(
        "baidu/ERNIE-4.5-300B-A47B-2Bits-TP4-Paddle", "300B-A47B", "instruct", "paddle", "2-bit",
        disk_bytes=_2BITS_BYTES,
    ),
    _entry("baidu/ERNIE-4.5-VL-28B-A3B-PT", "VL-28B-A3B", "instruct", "torch"),
    _entry("baidu/ERNIE-4.5-VL-28B-A3B-Paddle", "VL-28B-A3B", "instruct", "paddle"),
    _entry("baidu/ERNIE-4.5-VL-28B-A3B-Base-PT", "VL-28B-A3B", "base", "torch"),
    _entry("baidu/ERNIE-4.5-VL-28B-A3B-Base-Paddle", "VL-28B-A3B", "base", "paddle"),
    _entry("baidu/ERNIE-4.5-VL-28B-A3B-Thinking", "VL-28B-A3B", "thinking", "torch"),
    _entry("baidu/ERNIE-4.5-VL-424B-A47B-PT", "VL-424B-A47B", "instruct", "torch"),
    _entry("baidu/ERNIE-4.5-VL-424B-A47B-Paddle", "VL-424B-A47B", "instruct", "paddle"),
    _entry("baidu/ERNIE-4.5-VL-424B-A47B-Base-PT", "VL-424B-A47B", "base", "torch"),
    _entry("baidu/ERNIE-4.5-VL-424B-A47B-Base-Paddle", "VL-424B-A47B", "base", "paddle"),
)  # fmt: skip

_BY_NAME = MappingProxyType({entry.name.lower(): entry for entry in CATALOGUE})
_BY_SHORT_NAME = MappingProxyType({entry.short_name.lower(): entry for entry in CATALOGUE})


def list_models() -> list[ModelInfo]:
    """The checkpoints known by name: the built-in ones, then Baidu's 27, by size and family. No network is used."""
    return list(CATALOGUE)


def find(name: str) -> ModelInfo | None:
    """Look a checkpoint up by its full or short name, in any case; None when it is not in the catalogue."""
    spelling = name.strip().lower()
    return _BY_SHORT_NAME.get(spelling) or _BY_NAME.get(spelling)


def suggest(name: str) -> tuple[str, ...]:
    """Full names of up to three checkpoints that `name` may mean, best first; empty when none comes close.

    The organisation does not count: Baidu's models are also published as "PaddlePaddle/…" elsewhere.
    """
    short_name = name.strip().lower().rpartition("/")[2]
    close = difflib.get_close_matches(short_name, _BY_SHORT_NAME, n=3, cutoff=0.75)
    if short_name in close:
        close = [short_name]
    return tuple(_BY_SHORT_NAME[spelling].name for spelling in close)


def did_you_mean(name: str) -> str:
    """The same as a hint: "did you mean 'baidu/ERNIE-4.5-0.3B-PT'?", or "" when none comes close."""
    close = suggest(name)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def built_in_folder(entry: ModelInfo) -> Path:
    """Where the files of a built-in checkpoint lie inside the installed package (not checked to exist)."""
    return Path(str(importlib.resources.files("ernie45") / "assets" / "tiny" / entry.short_name))
