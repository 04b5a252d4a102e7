"""What would make a plan fit: small changes, each planned again before it is named; and the error that names them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ernie45.errors import OutOfMemoryError
from ernie45.memory.budget import MIN_CONTEXT_TOKENS, Budget, Limits, in_words
from ernie45.memory.machine import HostMemory
from ernie45.memory.plan import MemoryPlan
from ernie45.memory.sizing import Sizing, presets_by_quality

_NAMED_REMEDIES = 3  # in an error
_STEP_BYTES = 2**30 // 10  # memory is asked for in tenths of a GiB


def find_remedies(sizing: Sizing, plan: MemoryPlan) -> tuple[str, ...]:
    """The smallest changes that would make a plan fit, each one sentence, the most useful first; none if it fits.

    All are single ones. But where only more memory would do, a smaller preset is named together with another change,
    and so it is with the disk from which routed experts could stream.
    """
    if plan.verdict == "fits":
        return ()
    # A context that was left open stays as the plan shows it: more would fit with a shorter one.
    sizing = Sizing(replace(sizing.request, context_tokens=plan.context_tokens), sizing.preset)
    smaller = _smaller_presets(sizing)
    budget = Budget(context_tokens=plan.context_tokens, max_batch=plan.max_batch)
    found = [*_without_draft(sizing), *_presets(smaller), *_arguments(sizing, budget)]
    if not found and smaller:
        beside = f"quantization={smaller[-1].preset.name!r} and "
        found += [*_arguments(smaller[-1], budget, beside)] or [_more_memory(smaller[-1], beside)]
    found.append(_more_memory(sizing))
    if plan.verdict == "does not fit" and sizing.on_cpu is not None:
        found += _streaming([sizing.on_cpu, *reversed(_smaller_presets(sizing.on_cpu))])
    return tuple(found)


def refusal(plan: MemoryPlan, limits: Limits, host: HostMemory) -> OutOfMemoryError:
    """Why a plan that does not fit is not carried out: what takes how much where it is tightest, and who set the limit
    there, `limits` or the `host`."""
    fullest = max(plan.devices, key=lambda device: device.peak_bytes - device.capacity_bytes)
    kv, workspace = fullest.parts["kv_cache"], fullest.parts["workspace"]
    draft = fullest.parts["draft"]
    used = [("weights", fullest.weight_bytes - draft)]
    if draft:
        used.append(("weights of draft=", draft))
    if fullest.loading_bytes > kv + workspace:
        used.append(("buffers while loading", fullest.loading_bytes))
    else:
        used += [(f"KV cache for {plan.max_batch} x {plan.context_tokens} tokens", kv), ("workspace", workspace)]
    used.append(("runtime", fullest.parts["runtime"]))
    message = (
        f"this needs {in_words(fullest.peak_bytes)} on {fullest.device} as {plan.preset!r} "
        f"({', '.join(f'{what} {in_words(num_bytes)}' for what, num_bytes in used)}), and there are "
        f"{in_words(fullest.capacity_bytes)}"
    )
    named = limits.devices.get(fullest.device, limits.devices.get("cpu"))
    if fullest.device.startswith("cpu") and fullest.capacity_bytes != named:
        by_cgroup = host.limited_by == "cgroup" if named is None else host.most_bytes < host.total_bytes
        message += " within the limit of this process's memory cgroup" if by_cgroup else " in this machine"
    return OutOfMemoryError(message, hint=" ".join(plan.remedies[:_NAMED_REMEDIES]))


def _without_draft(sizing: Sizing) -> Iterator[str]:
    request = sizing.request
    if request.draft is None:
        return
    weights = None if request.weights is None else {**request.weights, "draft": 0}
    if Sizing(replace(request, draft=None, weights=weights), sizing.preset).choose("fits"):
        yield "It fits without draft=."


def _smaller_presets(sizing: Sizing) -> list[Sizing]:
    """The request with each preset that takes less, the best first; none for weights that are stored quantised."""
    if sizing.request.is_stored_quantised:
        return []
    asked = replace(sizing.request, weights=None)
    others = [Sizing(asked, preset) for preset in presets_by_quality(asked)]
    return [other for other in others if other.weight_bytes < sizing.weight_bytes]


def _presets(smaller: list[Sizing]) -> Iterator[str]:
    for other in smaller:
        if other.choose("fits"):
            size = in_words(other.weight_bytes)
            yield f"It fits with quantization={other.preset.name!r}: the weights then take {size}."
            return


def _arguments(sizing: Sizing, budget: Budget, beside: str = "") -> Iterator[str]:
    asked = sizing.request
    if asked.kv_dtype != "int8" and Sizing(replace(asked, kv_dtype="int8"), sizing.preset).choose("fits"):
        yield f"It fits with {beside}kv_dtype='int8': the KV cache then takes about half."
    rows = sizing.most_rows("fits", budget.context_tokens)
    if asked.max_batch is not None and rows:
        yield f"It fits with {beside}max_batch={rows} instead of {asked.max_batch}."
    tokens = sizing.most_tokens("fits", budget.max_batch, budget.context_tokens)
    if asked.context_tokens is not None and tokens >= MIN_CONTEXT_TOKENS:
        yield f"It fits with {beside}context_tokens={tokens} instead of {asked.context_tokens}."


def _more_memory(sizing: Sizing, beside: str = "") -> str:
    """How much memory on the last device would do."""
    *others, last = sizing.request.devices

    def fits(steps: int) -> bool:
        devices = (*others, replace(last, capacity_bytes=steps * _STEP_BYTES))
        return Sizing(replace(sizing.request, devices=devices), sizing.preset).choose("fits") is not None

    low = last.capacity_bytes // _STEP_BYTES  # too few
    high = low + 1
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return (
        f"It fits with {beside}{high / 10:.1f} GiB of memory on {last.name} instead of {in_words(last.capacity_bytes)}."
    )


def _streaming(candidates: list[Sizing]) -> Iterator[str]:
    """With which preset, and how much disk, experts are read as they are needed."""
    for index, other in enumerate(candidates):
        if not Sizing(replace(other.request, free_disk_bytes=None), other.preset).choose("streams"):
            continue
        free = other.request.free_disk_bytes
        needed = [f"quantization={other.preset.name!r}"] if index else []
        if free is not None and free < other.disk_bytes:
            needed.append(f"{math.ceil(other.disk_bytes / 1e9)} GB of disk")
        yield f"With {' and '.join(needed)} its routed experts are read from disk as they are needed."
        return
