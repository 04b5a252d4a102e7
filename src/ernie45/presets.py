"""Quantisation presets by name: which matrices of a model they cover, how, and what a matrix then takes in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ernie45.errors import InvalidRequestError

Scheme = Literal["int8", "int4", "nf4", "bnb-int8"]
"""How one matrix is stored: ours ("int8", "int4": docs/packed-format.md) or bitsandbytes' ("nf4", "bnb-int8")."""

Part = Literal["embedding", "head", "attention", "dense_mlp", "routed_experts", "shared_experts"]
"""The parts of a model that a preset may cover. Router, correction bias, norms and vision never are."""

WeightPart = Literal[
    "embedding", "head", "attention", "dense_mlp", "routed_experts", "shared_experts", "router", "norms", "vision",
    "scales", "draft",
]  # fmt: skip
"""What weights are counted by. Scales of quantised matrices stand by themselves; "draft" is all that only guesses."""

INT4_GROUP = 32
"""Columns of a row that share a scale in "int4". A matrix whose rows do not divide into groups is kept as "int8"."""
NF4_BLOCK = 64
"""Values in a row-major matrix that share a scale in "nf4"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantPreset:
    """What is quantised, and how; None leaves the model's dtype.

    Attributes:
        name: what reports call it; of `PRESETS` only if it is the same.
        experts: the routed experts, text's and pictures'.
        linear: attention, dense MLPs and shared experts.
        embedding: the embedding and the output head, "int8" or None.
    """

    name: str
    experts: Scheme | None = None
    linear: Scheme | None = None
    embedding: Literal["int8"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InvalidRequestError(
                f"QuantPreset: name={self.name!r} is not a name", hint='say what reports should call it, e.g. "mine"'
            )
        for field, known in (
            ("experts", ("int8", "int4", "nf4", "bnb-int8")),
            ("linear", ("int8", "int4", "nf4", "bnb-int8")),
            ("embedding", ("int8",)),
        ):
            value = getattr(self, field)
            if value is not None and value not in known:
                raise InvalidRequestError(
                    f"QuantPreset: {field}={value!r} is unknown", hint=f"use None or {', '.join(map(repr, known))}"
                )

    def scheme(self, part: Part, in_features: int) -> Scheme | None:
        """How a matrix of this part with rows of `in_features` is stored; None for the model's dtype."""
        if part in ("embedding", "head"):
            return self.embedding
        wanted = self.experts if part == "routed_experts" else self.linear
        if wanted == "int4" and in_features % INT4_GROUP:
            return "int8"
        return wanted


PRESETS: Mapping[str, QuantPreset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            QuantPreset(name="none"),
            QuantPreset(name="int8", experts="int8", linear="int8", embedding="int8"),
            QuantPreset(name="int4", experts="int4", linear="int4", embedding="int8"),
            QuantPreset(name="nf4", experts="nf4", linear="nf4"),
            QuantPreset(name="bnb-int8", experts="bnb-int8", linear="bnb-int8"),
        )
    }
)


def find_preset(quantization: str | QuantPreset) -> QuantPreset | None:
    """The preset of this name, or the one given; None for "auto", which depends on what fits.

    Raises:
        InvalidRequestError: no such name, or a preset that is given the name of another.
    """
    if isinstance(quantization, QuantPreset):
        if PRESETS.get(quantization.name, quantization) != quantization:
            raise InvalidRequestError(
                f"{quantization} has the name of another preset", hint="give a preset of your own another name"
            )
        return quantization
    if quantization == "auto":
        return None
    preset = PRESETS.get(quantization) if isinstance(quantization, str) else None
    if preset is None:
        names = ", ".join(map(repr, ("auto", *PRESETS)))
        raise InvalidRequestError(f"quantization={quantization!r} is unknown", hint=f"use {names}, or a QuantPreset")
    return preset


def code_bytes(scheme: Scheme | None, out_features: int, in_features: int, bytes_per_value: int) -> int:
    """Bytes of a matrix without its scales."""
    num_values = out_features * in_features
    if scheme is None:
        return num_values * bytes_per_value
    return -(-num_values // 2) if scheme in ("int4", "nf4") else num_values


def scale_bytes(scheme: Scheme | None, out_features: int, in_features: int) -> int:
    """Bytes of a matrix's scales: a float32 for each row, and in "int4" a byte for each group; in "nf4" a float32 for
    each block."""
    if scheme is None:
        return 0
    if scheme == "nf4":
        return 4 * -(-out_features * in_features // NF4_BLOCK)
    groups = out_features * in_features // INT4_GROUP if scheme == "int4" else 0
    return groups + 4 * out_features
