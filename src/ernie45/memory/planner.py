"""Making a MemoryPlan: the preset, what was left open, where the parts lie, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ernie45.memory.budget import (
    DEFAULT_CONTEXT_TOKENS,
    MIN_CONTEXT_TOKENS,
    Budget,
    in_words,
)
from ernie45.memory.estimate import WeightSites, add_parts
from ernie45.memory.placement import NOMINAL_RATES, DeviceMemory, Running, place, read_bytes
from ernie45.memory.plan import PART_NAMES, DevicePlan, MemoryPlan, Verdict
from ernie45.memory.remedies import find_remedies
from ernie45.memory.sizing import PlanRequest, Sizing, presets_by_quality
from ernie45.memory.streaming import token_read_bytes
from ernie45.presets import QuantPreset
from ernie45.types.placement import Placement
from ernie45.types.streaming import ExpertSlots

# What decoding reaches of the rate that memory/bandwidth.py measures, and seconds a token outside the native kernels.
# Measured: 0.83 to 1.01, and 0.8 to 1.4 ms. docs/guide/memory.md says on what.
_READ_SHARE = 0.88
_STEP_SECONDS = 1e-3
# A layer whose experts stream is run in several calls. The 21B in 4, 6 and 8 GiB, on two cores: 0.3 to 1 ms.
_STREAMED_LAYER_SECONDS = 0.7e-3


def make_plan(request: PlanRequest) -> MemoryPlan:
    """Plan from arithmetic alone; `with_speed` adds `tokens_per_second`.

    An open preset becomes the best in quality that fits with 8,192 tokens, or the model's maximum; where none does the
    smallest, a CPU's if experts stream to it. An open batch becomes as many rows of the context as fit, up to 32; an
    open context 8,192 tokens, the model's maximum or what fits, but at least 256.

    Raises:
        InvalidRequestError: a context outside 1 … the model's maximum, or a batch below 1.
    """
    return _plan(Sizing(request, request.preset or choose_preset(request)))


def with_speed(
    plan: MemoryPlan, measure_rate: Callable[[], float], measure_disk_rate: Callable[[], float]
) -> MemoryPlan:
    """The plan with the speed that a CPU's memory allows, and the disk where experts stream, both in bytes a second; as
    it was where it does not fit or another device works."""
    if plan.verdict == "does not fit" or any(not device.device.startswith("cpu") for device in plan.devices):
        return plan
    memory_rate = measure_rate()
    seconds = sum(device.token_bytes for device in plan.devices) / (_READ_SHARE * memory_rate) + _STEP_SECONDS
    disk_rate = None
    if plan.expert_read_bytes is not None:
        # Memory and disk take turns: what is to be read is known only when a layer gets there.
        disk_rate = measure_disk_rate()
        seconds += plan.expert_read_bytes / disk_rate
        seconds += _STREAMED_LAYER_SECONDS * sum(len(device.expert_layers) for device in plan.devices)
    return replace(plan, tokens_per_second=1 / seconds, memory_read_rate=memory_rate, disk_read_rate=disk_rate)


def choose_preset(request: PlanRequest) -> QuantPreset:
    """What "auto" means for this request, see `make_plan`."""
    tokens = request.context_tokens or min(DEFAULT_CONTEXT_TOKENS, request.spec.max_context_tokens)
    usual = replace(request, context_tokens=tokens)
    presets = presets_by_quality(request)
    found = next((preset for preset in presets if Sizing(usual, preset).choose("fits")), None)
    if found is not None:
        return found
    smallest = Sizing(request, presets[-1])
    if smallest.on_cpu is None or smallest.choose("fits"):
        return smallest.preset
    on_cpu = Sizing(smallest.on_cpu.request, presets_by_quality(smallest.on_cpu.request)[-1])
    return on_cpu.preset if on_cpu.choose("streams") else smallest.preset


def _plan(sizing: Sizing) -> MemoryPlan:
    asked, spec, slots = sizing, sizing.spec, None
    verdict: Verdict = "fits"
    budget = sizing.choose("fits")
    if budget is None and sizing.on_cpu is not None:
        budget = sizing.choose("streams")
        if budget is not None:
            verdict, sizing = "streams", sizing.on_cpu
            slots = sizing.expert_slots(budget)
    request = sizing.request
    if budget is None:
        verdict = "does not fit"
        least = min(MIN_CONTEXT_TOKENS, spec.max_context_tokens)
        budget = Budget(context_tokens=request.context_tokens or least, max_batch=request.max_batch or 1)
    running, sites = sizing.running(budget), sizing.sites
    if slots is not None:
        running, sites = sizing.running_beside_readers(budget), sizing.sites_with(slots)
    placement = place(sites, request.devices, running)
    devices = _device_plans(placement, sites, request.devices, running)
    attainable: Verdict = "streams" if verdict == "streams" else "fits"
    plan = MemoryPlan(
        model=request.model,
        preset=sizing.preset.name,
        dtype=request.dtype,
        kv_dtype=request.dtype if request.kv_dtype == "auto" else request.kv_dtype,
        context_tokens=budget.context_tokens,
        max_batch=budget.max_batch,
        devices=devices,
        placement=placement,
        disk_bytes=sizing.disk_bytes,
        free_disk_bytes=request.free_disk_bytes,
        verdict=verdict,
        bottleneck=_bottleneck(verdict, devices),
        remedies=(),
        longest_context_tokens=sizing.most_tokens(attainable, budget.max_batch, spec.max_context_tokens),
        largest_batch=sizing.most_rows(attainable, budget.context_tokens),
        tokens_per_second=None,
        notes=request.notes,
    )
    if slots is not None:
        plan = _streamed(plan, sizing, slots)
    return replace(plan, remedies=find_remedies(asked, plan))


def _streamed(plan: MemoryPlan, sizing: Sizing, slots: ExpertSlots) -> MemoryPlan:
    """With what there is to say about experts that are read from disk."""
    text, *pictures = sizing.banks
    routing = sizing.request.routing
    hit_rate = slots.text / text.num_experts if routing is None else routing.hit_rate(slots.text)
    read_bytes = token_read_bytes(text, hit_rate)
    notes = plan.notes
    if text.stored_bytes > text.held_bytes:
        notes += (
            f"The files have {text.stored_bytes / text.held_bytes:.1f} times the bytes that an expert takes in memory, "
            "and it is quantised whenever it is read. A packed folder, which `ernie45 convert` writes, spares both.",
        )
    return replace(
        plan,
        num_experts=ExpertSlots(text=text.num_experts, vision=sum(bank.num_experts for bank in pictures)),
        expert_slots=slots,
        expert_hit_rate=hit_rate,
        routing_tokens=None if routing is None else routing.num_tokens,
        expert_read_bytes=read_bytes,
        bottleneck=f"speed: {in_words(read_bytes)} of experts are read from disk for each token",
        notes=notes,
    )


def _device_plans(
    placement: Placement, sites: WeightSites, devices: tuple[DeviceMemory, ...], running: Running
) -> tuple[DevicePlan, ...]:
    capacities = {device.name: device.capacity_bytes for device in devices}
    read = read_bytes(placement, sites, running)
    plans = []
    for name in placement.devices:
        layers = tuple(index for index, device in enumerate(placement.layers) if device == name)
        experts = tuple(
            index for index, device in enumerate(placement.experts) if device == name and sites.experts[index]
        )
        held = [sites.layers[index] for index in layers] + [sites.experts[index] for index in experts]
        ends = ((placement.embedding, sites.embedding), (placement.vision, sites.vision), (placement.head, sites.head))
        parts = dict.fromkeys(PART_NAMES, 0)
        for part, num_bytes in add_parts([*held, *(site for device, site in ends if device == name)]).items():
            parts[part] = num_bytes
        parts["kv_cache"] = running.kv_layer_bytes * len(layers)
        if name == placement.embedding:
            parts["kv_cache"] += running.draft_kv_bytes
        parts["workspace"], parts["runtime"] = running.workspace_bytes, running.runtime_bytes
        plans.append(
            DevicePlan(
                device=name,
                capacity_bytes=capacities[name],
                parts=parts,
                loading_bytes=running.loading_bytes,
                layers=layers,
                expert_layers=experts,
                token_bytes=read[name],
            )
        )
    return tuple(plans)


def _bottleneck(verdict: Verdict, devices: tuple[DevicePlan, ...]) -> str:
    if verdict == "fits":
        slowest = max(devices, key=lambda device: device.token_bytes / NOMINAL_RATES[device.device.partition(":")[0]])
        return f"speed: {slowest.device} reads {in_words(slowest.token_bytes)} for each token"
    fullest = max(devices, key=lambda device: device.peak_bytes - device.capacity_bytes)
    largest = max(fullest.parts, key=lambda part: fullest.parts[part])
    return (
        f"memory: {fullest.device} may use {in_words(fullest.capacity_bytes)}, and {in_words(fullest.peak_bytes)} are "
        f"needed, of which {largest.replace('_', ' ')} are {in_words(fullest.parts[largest])}"
    )
