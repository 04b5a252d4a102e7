"""MemoryPlan: what a model needs, where it lies, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ernie45.memory.card import card
from ernie45.memory.table import explain, headline, plain_values, verdict
from ernie45.types.placement import Placement
from ernie45.types.streaming import ExpertSlots

Verdict = Literal["fits", "streams", "does not fit"]

PART_NAMES = (
    "embedding", "head", "attention", "dense_mlp", "routed_experts", "shared_experts", "router", "norms", "vision",
    "scales", "draft", "kv_cache", "workspace", "runtime",
)  # fmt: skip
"""What a plan counts, in this order: the weights by part, then what running needs beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlan:
    """What one device holds.

    `parts` are bytes by `PART_NAMES`; `loading_bytes` is what loading needs beside the weights at its highest, for a
    moment; `capacity_bytes` is what may be used. `layers` are the numbers of the layers whose attention and KV cache
    lie here, `expert_layers` of those whose routed experts do. `token_bytes` is what is read here to make one token,
    after half of the context.
    """

    device: str
    capacity_bytes: int
    parts: Mapping[str, int]
    loading_bytes: int
    layers: tuple[int, ...]
    expert_layers: tuple[int, ...]
    token_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.parts.values()) - self.parts["kv_cache"] - self.parts["workspace"] - self.parts["runtime"]

    @property
    def peak_bytes(self) -> int:
        """The most that is in use at any time: while loading, or while running with context and batch used up."""
        running = self.parts["kv_cache"] + self.parts["workspace"]
        return self.weight_bytes + self.parts["runtime"] + max(running, self.loading_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """The memory of one model on one machine, from arithmetic alone.

    Attributes:
        model: the name or folder it was made for.
        preset: the quantisation it is for, `dtype` and `kv_dtype` the dtypes of the arithmetic and of the KV cache.
        context_tokens: longest prompt + reply that is reserved for; `max_batch` how many at a time.
        devices: what each device holds, in the order of the work.
        placement: which device has which part.
        disk_bytes: what the weights take on disk in this preset's format; `free_disk_bytes` what there is for them,
            None where no limit was named.
        verdict: "fits"; "streams" when all but the routed experts fits and these are read from disk as they are needed
            (the bytes are then those of the experts that are held); or "does not fit".
        bottleneck: in words, what limits the verdict, or the speed where it fits.
        remedies: the smallest changes that would make it fit, each one sentence; empty where it fits.
        longest_context_tokens: the longest context that fits, or streams where the plan does, at `max_batch`; 0 when
            none does.
        largest_batch: the largest batch that does at `context_tokens`; 0 when none does.
        tokens_per_second: decoding speed of one request, estimated from `memory_read_rate` and `disk_read_rate`; None
            where nothing was measured.
        memory_read_rate: bytes a second, measured here; None where it was not.
        num_experts: of a plan that streams, how many routed experts there are over all layers, None otherwise, as the
            following are; and `expert_slots` how many of them are held in memory.
        expert_hit_rate: the share of a text token's routed experts that is in memory: as in a routing trace of
            `routing_tokens`, or with None for these if all are chosen equally often.
        expert_read_bytes: what one token reads from disk for the others.
        disk_read_rate: bytes a second from the checkpoint's files, measured; nominal where there are none; None where
            no speed was estimated.
        notes: what else a reader should know, such as that a release is refused when it is loaded.
    """

    model: str
    preset: str
    dtype: str
    kv_dtype: str
    context_tokens: int
    max_batch: int
    devices: tuple[DevicePlan, ...]
    placement: Placement
    disk_bytes: int
    free_disk_bytes: int | None
    verdict: Verdict
    bottleneck: str
    remedies: tuple[str, ...]
    longest_context_tokens: int
    largest_batch: int
    tokens_per_second: float | None
    memory_read_rate: float | None = None
    num_experts: ExpertSlots | None = None
    expert_slots: ExpertSlots | None = None
    expert_hit_rate: float | None = None
    routing_tokens: int | None = None
    expert_read_bytes: int | None = None
    disk_read_rate: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, int]:
        """Bytes by `PART_NAMES`, over all devices."""
        return {name: sum(device.parts[name] for device in self.devices) for name in PART_NAMES}

    @property
    def weight_bytes(self) -> int:
        """Weights with their scales, as they lie in memory."""
        return sum(device.weight_bytes for device in self.devices)

    @property
    def kv_bytes(self) -> int:
        """The KV cache, when context and batch are used up."""
        return self.parts["kv_cache"]

    @property
    def workspace_bytes(self) -> int:
        """What a step of the longest prompt needs for its intermediate values."""
        return self.parts["workspace"]

    @property
    def loading_bytes(self) -> int:
        """What loading needs beside the weights at its highest."""
        return max(device.loading_bytes for device in self.devices)

    @property
    def peak_bytes(self) -> int:
        """The most in use at any time, over all devices."""
        return sum(device.peak_bytes for device in self.devices)

    @property
    def placements(self) -> tuple[DevicePlan, ...]:
        """The same as `devices`: what lies where."""
        return self.devices

    def explain(self) -> str:
        """The plan as a table for people, in lines of at most 100 columns; so is `str(plan)`."""
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan in types that JSON knows; keys that end in `_bytes` are bytes."""
        return plain_values(self)

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        return self.explain()

    def __repr__(self) -> str:
        return f"<MemoryPlan {headline(self)}: {verdict(self)}>"

    def _repr_html_(self) -> str:
        return card(self)
