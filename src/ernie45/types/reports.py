"""What loading did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadTensor:
    """A stored tensor that was read: its name in the files, and the -PT names of what it holds.

    `transposed`: the file has [in, out]. A tensor with several `names` was split into these. `fused`: what it holds is
    part of a larger matrix in memory, as query, key and value are.
    """

    key: str
    names: tuple[str, ...]
    transposed: bool
    fused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredTensor:
    """A stored tensor that was not read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What was read from a checkpoint folder. Every stored tensor stands in `read` or in `ignored`.

    `layout` is "pt", "paddle" or "paddleformers". `unknown_config_keys` are keys of config.json that ernie45 does not
    know; they may or may not matter. `adapter` is the folder of the adapter that was merged. `max_pixels` is what
    pictures are resized to at most, None for a model that reads text only. `preset` is the quantisation;
    `weight_parts` are the bytes of the weights by part, `planned_peak_bytes` the most memory that loading and running
    were planned to take.
    """

    folder: str
    layout: str
    read: tuple[ReadTensor, ...]
    weight_bytes: int
    load_seconds: float
    device: str
    dtype: str
    ignored: tuple[IgnoredTensor, ...] = ()
    unknown_config_keys: tuple[str, ...] = ()
    adapter: str | None = None
    max_pixels: int | None = None
    preset: str = "none"
    weight_parts: Mapping[str, int] = field(default_factory=dict)
    planned_peak_bytes: int = 0

    @property
    def num_tensors(self) -> int:
        """How many stored tensors were read."""
        return len(self.read)

    def __str__(self) -> str:
        transposed = sum(tensor.transposed for tensor in self.read)
        split = sum(len(tensor.names) > 1 for tensor in self.read)
        fused = sum(tensor.fused for tensor in self.read)
        lines = [
            f"{self.folder}: layout {self.layout!r}, {self.weight_bytes:,} bytes of weights as {self.dtype} on "
            f"{self.device} in {self.load_seconds:.1f} s",
            f"preset {self.preset!r}, planned to take at most {self.planned_peak_bytes:,} bytes with context and batch "
            "used up",
            f"{self.num_tensors} tensors read ({transposed} transposed, {split} split, {fused} fused), "
            f"{len(self.ignored)} ignored",
        ]
        reasons: dict[str, list[str]] = {}
        for tensor in self.ignored:
            reasons.setdefault(tensor.reason, []).append(tensor.name)
        lines += [f"ignored, {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        if self.max_pixels is not None:
            lines.append(f"pictures are resized to at most {self.max_pixels:,} pixels (max_pixels= sets another limit)")
        if self.adapter is not None:
            lines.append(f"merged adapter: {self.adapter}")
        if self.unknown_config_keys:
            lines.append(f"unknown keys in config.json: {', '.join(self.unknown_config_keys)}")
        return "\n".join(lines)
