"""A MemoryPlan as text for a terminal, and as plain values for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ernie45.memory.budget import in_words

if TYPE_CHECKING:
    from ernie45.memory.plan import DevicePlan, MemoryPlan
    from ernie45.types.streaming import ExpertSlots

LABELS: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "embedding",
        "head": "output head",
        "attention": "attention",
        "dense_mlp": "dense MLP",
        "routed_experts": "routed experts",
        "shared_experts": "shared experts",
        "router": "router",
        "norms": "norms",
        "vision": "vision",
        "scales": "scales",
        "draft": "draft",
        "kv_cache": "KV cache",
        "workspace": "workspace",
        "runtime": "runtime",
    }
)
"""What people call the parts of a plan."""

_WIDTH = 100
_BAR_WIDTH = 50  # of a whole device
_LABEL_WIDTH = 12


def explain(plan: MemoryPlan) -> str:
    """Lines of at most 100 columns: the verdict, the parts of each device, limits, speed, remedies and notes."""
    wrapper = textwrap.TextWrapper(_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    lines = [f"{headline(plan)}: {verdict(plan)}"]
    if len(lines[0]) > _WIDTH:
        lines = [*wrapper.wrap(f"{headline(plan)}:"), f"  {verdict(plan)}"]
    for device in plan.devices:
        place = describe_place(plan, device)
        lines += ["", *wrapper.wrap(f"{device.device}: {place}" if place else device.device), *_device_lines(device)]
    lines.append("")
    for label, text in facts(plan):
        lines += _labelled(label, text)
    for number, remedy in enumerate(plan.remedies, start=1):
        lines += _labelled("Remedies" if number == 1 else "", remedy, mark=f"{number}. ")
    for note in plan.notes:
        lines += _labelled("Note", note)
    return "\n".join(lines)


def headline(plan: MemoryPlan) -> str:
    """What was planned: "baidu/ERNIE-4.5-21B-A3B-PT as int4, bfloat16, 8,192 tokens x 1"."""
    return f"{plan.model} {describe_options(plan)}"


def describe_options(plan: MemoryPlan) -> str:
    """ "as int4, bfloat16, 8,192 tokens x 1"."""
    kv = "" if plan.kv_dtype == plan.dtype else f", KV cache {plan.kv_dtype}"
    preset = "unquantised" if plan.preset == "none" else f"as {plan.preset}"
    return f"{preset}, {plan.dtype}{kv}, {plan.context_tokens:,} tokens x {plan.max_batch:,}"


def verdict(plan: MemoryPlan) -> str:
    """ "fits, 23.79 GiB of 24.00 GiB" or "does not fit, 25.10 GiB needed, 1.10 GiB too much"."""
    needed = in_words(plan.peak_bytes)
    if plan.verdict != "does not fit":
        return f"{plan.verdict}, {needed} of {in_words(sum(device.capacity_bytes for device in plan.devices))}"
    excess = sum(max(device.peak_bytes - device.capacity_bytes, 0) for device in plan.devices)
    return f"{plan.verdict}, {needed} needed, {in_words(excess)} too much"


def describe_place(plan: MemoryPlan, device: DevicePlan) -> str:
    """ "layers 0-27, routed experts of layers 1-16" where there are several devices, else ""."""
    if len(plan.devices) == 1:
        return ""
    held = [f"layers {layer_ranges(device.layers)}"] if device.layers else []
    if device.expert_layers:
        held.append(f"routed experts of layers {layer_ranges(device.expert_layers)}")
    return ", ".join(held)


def layer_ranges(layers: Sequence[int]) -> str:
    """ "0-3, 5" of 0, 1, 2, 3, 5."""
    firsts = [layer for layer in layers if layer - 1 not in layers]
    lasts = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(
        f"{first}-{last}" if last > first else f"{first}" for first, last in zip(firsts, lasts, strict=True)
    )


def facts(plan: MemoryPlan) -> Iterator[tuple[str, str]]:
    """What there is to say beside parts, remedies and notes: a label and a sentence each."""
    if plan.expert_read_bytes is not None:
        yield (
            "Experts",
            f"{_held_experts(plan)}; the others are read from disk as they are needed: "
            f"{in_words(plan.expert_read_bytes)} for each token, {_routing(plan)}",
        )
    if plan.longest_context_tokens or plan.largest_batch:
        yield "Limits", f"{_longest_context(plan)}; {_largest_batch(plan)}"
    if plan.tokens_per_second is not None and plan.memory_read_rate is not None:
        disk = "" if plan.disk_read_rate is None else f" and a disk that reads {_rate(plan.disk_read_rate)}"
        yield (
            "Speed",
            f"about {_speed(plan.tokens_per_second)} tokens/s for one request, estimated from a memory bandwidth of "
            f"{_rate(plan.memory_read_rate)}{disk}",
        )
    yield "Bottleneck", plan.bottleneck
    if plan.free_disk_bytes is not None or plan.verdict == "streams":
        free = "" if plan.free_disk_bytes is None else f"; {plan.free_disk_bytes / 1e9:.1f} GB may be used"
        yield "Disk", f"{plan.disk_bytes / 1e9:.1f} GB for the weights in this form{free}"


def running_bytes(device: DevicePlan) -> int:
    """All parts of a device, with context and batch used up."""
    return sum(device.parts.values())


def loading_peak_bytes(device: DevicePlan) -> int:
    """The most in use on a device while loading."""
    return device.weight_bytes + device.parts["runtime"] + device.loading_bytes


def plain_values(plan: MemoryPlan) -> dict[str, Any]:
    """The plan in types that JSON knows; docs/guide/memory.md lists the keys."""
    placement = plan.placement
    return {
        "model": plan.model,
        "preset": plan.preset,
        "dtype": plan.dtype,
        "kv_dtype": plan.kv_dtype,
        "context_tokens": plan.context_tokens,
        "max_batch": plan.max_batch,
        "verdict": plan.verdict,
        "peak_bytes": plan.peak_bytes,
        "weight_bytes": plan.weight_bytes,
        "kv_bytes": plan.kv_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "loading_bytes": plan.loading_bytes,
        "part_bytes": dict(plan.parts),
        "devices": [_device_values(device) for device in plan.devices],
        "placement": {
            "embedding": placement.embedding,
            "layers": list(placement.layers),
            "experts": list(placement.experts),
            "head": placement.head,
            "vision": placement.vision,
        },
        "disk_bytes": plan.disk_bytes,
        "free_disk_bytes": plan.free_disk_bytes,
        "longest_context_tokens": plan.longest_context_tokens,
        "largest_batch": plan.largest_batch,
        "tokens_per_second": plan.tokens_per_second,
        "memory_bytes_per_second": plan.memory_read_rate,
        "num_experts": _counts(plan.num_experts),
        "expert_slots": _counts(plan.expert_slots),
        "expert_hit_rate": plan.expert_hit_rate,
        "routing_tokens": plan.routing_tokens,
        "expert_read_bytes": plan.expert_read_bytes,
        "disk_bytes_per_second": plan.disk_read_rate,
        "bottleneck": plan.bottleneck,
        "remedies": list(plan.remedies),
        "notes": list(plan.notes),
    }


def _counts(experts: ExpertSlots | None) -> dict[str, int] | None:
    return None if experts is None else {"text": experts.text, "vision": experts.vision}


def _device_values(device: DevicePlan) -> dict[str, Any]:
    return {
        "device": device.device,
        "capacity_bytes": device.capacity_bytes,
        "peak_bytes": device.peak_bytes,
        "running_bytes": running_bytes(device),
        "loading_peak_bytes": loading_peak_bytes(device),
        "weight_bytes": device.weight_bytes,
        "loading_bytes": device.loading_bytes,
        "token_bytes": device.token_bytes,
        "part_bytes": dict(device.parts),
        "layers": list(device.layers),
        "expert_layers": list(device.expert_layers),
    }


def _device_lines(device: DevicePlan) -> Iterator[str]:
    total = running_bytes(device)
    for part, num_bytes in device.parts.items():
        if num_bytes:
            share = num_bytes / total
            bar = "#" * round(share * _BAR_WIDTH)
            yield f"  {LABELS[part]:<15}{in_words(num_bytes):>12}{share:>8.1%}  {bar}".rstrip()
    for label, num_bytes in (
        ("while running", total),
        ("while loading", loading_peak_bytes(device)),
        ("may be used", device.capacity_bytes),
    ):
        yield f"  {label:<15}{in_words(num_bytes):>12}"


def _labelled(label: str, text: str, mark: str = "") -> list[str]:
    """The text beside its label, `mark` hanging out to the left of its lines."""
    return textwrap.wrap(
        mark + text,
        _WIDTH,
        initial_indent=label.ljust(_LABEL_WIDTH),
        subsequent_indent=" " * (_LABEL_WIDTH + len(mark)),
        break_on_hyphens=False,
    )


def _held_experts(plan: MemoryPlan) -> str:
    """ "673 of 1,728 in memory, 39 %", those for pictures apart."""
    held, there = plan.expert_slots, plan.num_experts
    assert held is not None
    assert there is not None
    text = f"{held.text:,} of {there.text:,}"
    if there.vision:
        text += f" for text and {held.vision:,} of {there.vision:,} for pictures"
    return f"{text} in memory, {(held.text + held.vision) / (there.text + there.vision):.0%}".replace("%", " %")


def _routing(plan: MemoryPlan) -> str:
    """What a token's reads follow from."""
    if plan.routing_tokens is None:
        return "if all are chosen equally often"
    assert plan.expert_hit_rate is not None
    found = f"{plan.expert_hit_rate:.0%}".replace("%", " %")
    return f"if {found} of its experts are in memory, as in a routing trace of {plan.routing_tokens:,} tokens"


def _longest_context(plan: MemoryPlan) -> str:
    rows = _requests(plan.max_batch)
    if not plan.longest_context_tokens:
        return f"no context fits with {rows} at a time"
    return f"up to {plan.longest_context_tokens:,} tokens with {rows} at a time"


def _largest_batch(plan: MemoryPlan) -> str:
    if not plan.largest_batch:
        return f"not even 1 request fits with {plan.context_tokens:,} tokens"
    return f"up to {_requests(plan.largest_batch)} with {plan.context_tokens:,} tokens"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count:,} requests"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s"


def _speed(tokens_per_second: float) -> str:
    return f"{float(f'{tokens_per_second:.2g}'):,g}"
