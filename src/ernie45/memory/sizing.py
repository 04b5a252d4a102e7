"""How a model with a preset would lie on some devices, and with which context and batch it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ernie45.memory.budget import (
    DEFAULT_CONTEXT_TOKENS,
    DEFAULT_MAX_BATCH,
    DTYPE_BYTES,
    MIN_CONTEXT_TOKENS,
    Budget,
    KVDtype,
    check_budget,
    kv_bytes_per_token,
    slot_tokens,
)
from ernie45.memory.estimate import PartBytes, WeightSites, estimate_sites, share
from ernie45.memory.placement import DeviceMemory, Running, excess_bytes, place, token_seconds
from ernie45.memory.plan import Verdict
from ernie45.memory.streaming import RecordedRouting, StreamedBank, share_out, streamed_banks, usable_bytes
from ernie45.memory.workspace import (
    RUNTIME_BYTES,
    angle_bytes,
    loading_bytes,
    mtp_bytes,
    reading_bytes,
    runs_natively,
    workspace_bytes,
)
from ernie45.presets import PRESETS, QuantPreset
from ernie45.spec import DtypeName, ModelSpec
from ernie45.types.streaming import ExpertSlots

# "auto" takes the first that fits.
_BY_QUALITY = {"cpu": ("none", "int8", "int4"), "cuda": ("none", "bnb-int8", "nf4"), "mps": ("none", "int8", "int4")}
_SLOWED_BY_BATCH = 1.1  # at most, one request beside no others


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftNeeds:
    """What guesses tokens: another `model`, with its preset; the checkpoint's own head (`mtp`); or neither, which takes
    no more than the rows that a step checks."""

    model: PlanRequest | None = None
    mtp: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What a plan is wanted for; None leaves a thing open.

    Attributes:
        model: the name or folder.
        dtype: of the arithmetic, and of what the preset does not cover.
        kv_dtype: "auto" is `dtype`.
        devices: what may be used, accelerators first.
        has_own_head: whether the output head is a matrix of its own.
        stored_dtype: of the files, which what the preset does not cover keeps on disk; None is `dtype`.
        free_disk_bytes: what the disk may take, None where it was not named.
        weights: bytes by part that a build with `preset` has found, which then count and not the estimate.
        max_pixels: of a picture; None is the checkpoint's own limit.
        draft: what guesses tokens, None where nothing does.
        is_stored_quantised: whether `preset` is how the files are stored, so that no other can be had of them.
        native: whether CPUs have native kernels, which know how the files are stored.
        can_stream: whether the model's backend can read experts while it runs.
        routing: what routers chose, where that is known.
        notes: for the plan.
    """

    model: str
    spec: ModelSpec
    preset: QuantPreset | None
    dtype: DtypeName
    kv_dtype: KVDtype
    context_tokens: int | None
    max_batch: int | None
    devices: tuple[DeviceMemory, ...]
    has_own_head: bool
    stored_dtype: DtypeName | None = None
    free_disk_bytes: int | None = None
    weights: PartBytes | None = None
    max_pixels: int | None = None
    draft: DraftNeeds | None = None
    is_stored_quantised: bool = False
    native: bool = False
    can_stream: bool = True
    routing: RecordedRouting | None = None
    notes: tuple[str, ...] = ()


class Sizing:
    """A request with its preset: how a context and a batch would lie on the devices.

    Raises InvalidRequestError for a context outside 1 … the model's maximum, or a batch below 1.
    """

    def __init__(self, request: PlanRequest, preset: QuantPreset) -> None:
        check_budget(request.spec, context_tokens=request.context_tokens, max_batch=request.max_batch)
        self.request, self.preset, self.spec = request, preset, request.spec
        self.bytes_per_value = DTYPE_BYTES[request.dtype]
        self.kv_token_bytes = kv_bytes_per_token(
            self.spec, bytes_per_value=self.bytes_per_value, kv_dtype=request.kv_dtype
        )
        mtp = request.draft is not None and request.draft.mtp
        sites, on_disk = (
            estimate_sites(self.spec, preset, bytes_per_value=size, has_own_head=request.has_own_head, mtp=mtp)
            for size in (self.bytes_per_value, DTYPE_BYTES[request.stored_dtype or request.dtype])
        )
        self.sites = sites if request.weights is None else sites.scaled_to(request.weights)
        self.disk_bytes = self.sites.total().total() + on_disk.total().total() - sites.total().total()
        native_on_cpu = request.native and runs_natively(self.spec, preset, request.dtype)
        self.native = native_on_cpu and all(device.kind == "cpu" for device in request.devices)
        self.banks = _banks(request, preset, sites, native=native_on_cpu)  # experts stream to a CPU
        self._mtp, self._draft = mtp, _draft_sizing(request)
        if self._draft is not None:
            self.sites = _with_draft(self.sites, self._draft.weight_bytes)
        self.weight_bytes: int = self.sites.total().total()

    @cached_property
    def on_cpu(self) -> Sizing | None:
        """The same on the first CPU alone: experts that stream need all else beside them. None without a CPU."""
        cpu = next((device for device in self.request.devices if device.kind == "cpu"), None)
        if cpu is None:
            return None
        return self if self.request.devices == (cpu,) else Sizing(replace(self.request, devices=(cpu,)), self.preset)

    def running(self, budget: Budget) -> Running:
        alone = self._alone(budget)
        if self._mtp:
            kv_bytes = alone.kv_layer_bytes
            beside = mtp_bytes(
                self.spec,
                bytes_per_value=self.bytes_per_value,
                context_tokens=budget.context_tokens,
                max_batch=budget.max_batch,
            )
            return replace(alone, workspace_bytes=alone.workspace_bytes + beside, draft_kv_bytes=kv_bytes)
        if self._draft is None:
            return alone
        spec = self._draft.spec
        tokens = min(budget.context_tokens, spec.max_context_tokens)
        draft = self._draft.running(replace(budget, context_tokens=tokens))
        workspace = alone.workspace_bytes + draft.workspace_bytes
        if self.native and self._draft.native:  # they take turns in one block of memory, where torch's heaps keep both
            angles = angle_bytes(self.spec, budget.context_tokens), angle_bytes(spec, tokens)
            workspace = sum(angles) + max(alone.workspace_bytes - angles[0], draft.workspace_bytes - angles[1])
        return replace(
            alone,
            workspace_bytes=workspace,
            loading_bytes=max(alone.loading_bytes, draft.loading_bytes),
            draft_kv_bytes=draft.kv_layer_bytes * spec.num_layers,
        )

    def _alone(self, budget: Budget) -> Running:
        """Without what guesses, but with the rows that are checked."""
        slot_bytes = self.kv_token_bytes * slot_tokens(budget.context_tokens)
        return Running(
            kv_layer_bytes=slot_bytes * budget.max_batch // self.spec.num_layers,
            kv_read_bytes=self.kv_token_bytes * budget.context_tokens // 2 // self.spec.num_layers,
            workspace_bytes=workspace_bytes(
                self.spec,
                self.preset,
                bytes_per_value=self.bytes_per_value,
                context_tokens=budget.context_tokens,
                max_batch=budget.max_batch,
                kv_dtype=self.request.kv_dtype,
                max_pixels=self.request.max_pixels,
                has_draft=self.request.draft is not None,
                native=self.native,
            ),
            loading_bytes=loading_bytes(
                self.spec, self.preset, bytes_per_value=self.bytes_per_value, native=self.native
            ),
            runtime_bytes=RUNTIME_BYTES,
        )

    def running_beside_readers(self, budget: Budget) -> Running:
        """The same where experts stream."""
        running = self.running(budget)
        reading = reading_bytes(
            self.spec,
            self.preset,
            bytes_per_value=self.bytes_per_value,
            stored_bytes=max(bank.stored_bytes for bank in self.banks),
            is_stored_quantised=self.request.is_stored_quantised,
            context_tokens=budget.context_tokens,
            max_batch=budget.max_batch,
            native=self.native,
        )
        return replace(running, workspace_bytes=running.workspace_bytes + reading)

    def expert_slots(self, budget: Budget) -> ExpertSlots | None:
        """How many routed experts are held beside all else `on_cpu`; None where not even the fewest that a layer works
        with fit, or there are none, or the disk is too small."""
        free = self.request.free_disk_bytes
        if not self.banks or not self.request.can_stream or (free is not None and free < self.disk_bytes):
            return None
        running = self.running_beside_readers(budget)
        expert_bytes = sum(sum(site.values()) for site in self.sites.experts)
        kv_bytes = running.kv_layer_bytes * self.spec.num_layers + running.draft_kv_bytes
        used_bytes = max(kv_bytes + running.workspace_bytes, running.loading_bytes) + running.runtime_bytes
        capacity_bytes = usable_bytes(self.request.devices[0].capacity_bytes)
        counts = share_out(self.banks, capacity_bytes - used_bytes - (self.weight_bytes - expert_bytes))
        return None if counts is None else ExpertSlots(text=counts[0], vision=sum(counts[1:]))

    def sites_with(self, slots: ExpertSlots) -> WeightSites:
        """The weights with so many routed experts, which the layers share."""
        counts = (slots.text, slots.vision)
        held: PartBytes = {
            "routed_experts": sum(count * bank.code_bytes for count, bank in zip(counts, self.banks, strict=False)),
            "scales": sum(count * bank.scale_bytes for count, bank in zip(counts, self.banks, strict=False)),
        }
        layers = [layer for layer, site in enumerate(self.sites.experts) if site]
        experts: list[PartBytes] = [{} for _ in self.sites.experts]
        for index, layer in enumerate(layers):
            experts[layer] = {
                part: num_bytes * (index + 1) // len(layers) - num_bytes * index // len(layers)
                for part, num_bytes in held.items()
            }
        return replace(self.sites, experts=tuple(experts))

    def holds(self, verdict: Verdict, budget: Budget) -> bool:
        """Whether it "fits", or "streams"."""
        if verdict == "streams":
            return self.on_cpu is not None and self.on_cpu.expert_slots(budget) is not None
        running = self.running(budget)
        devices, sites = self.request.devices, self.sites
        return excess_bytes(place(sites, devices, running), sites, devices, running) == 0

    def choose(self, verdict: Verdict) -> Budget | None:
        """What was left open, so that this verdict holds; None if nothing makes it hold."""
        asked = self.request
        tokens = asked.context_tokens or min(DEFAULT_CONTEXT_TOKENS, self.spec.max_context_tokens)
        least = tokens if asked.context_tokens else min(tokens, MIN_CONTEXT_TOKENS)
        rows = asked.max_batch or self._open_rows(verdict, tokens)
        tokens = self.most_tokens(verdict, rows, tokens, least)
        return Budget(context_tokens=tokens, max_batch=rows) if tokens else None

    def most_tokens(self, verdict: Verdict, rows: int, most: int, least: int = 1) -> int:
        """The longest context from `least` to `most` that holds with so many rows; 0 if none does."""
        return _largest(lambda tokens: self.holds(verdict, Budget(context_tokens=tokens, max_batch=rows)), least, most)

    def most_rows(self, verdict: Verdict, tokens: int) -> int:
        """The largest batch that holds with so many tokens; 0 if none does."""
        capacity_bytes = sum(device.capacity_bytes for device in self.request.devices)
        most = max(1, capacity_bytes // (self.kv_token_bytes * tokens))
        return _largest(lambda rows: self.holds(verdict, Budget(context_tokens=tokens, max_batch=rows)), 1, most)

    def _open_rows(self, verdict: Verdict, tokens: int) -> int:
        """As many rows as fit, but no more than leave one request its speed: a KV cache drives weights off the faster
        device. One where experts stream, which want the memory for themselves."""
        if verdict == "streams":
            return 1
        slowest = _SLOWED_BY_BATCH * self._seconds(Budget(context_tokens=tokens, max_batch=1))

        def holds(rows: int) -> bool:
            budget = Budget(context_tokens=tokens, max_batch=rows)
            return self.holds(verdict, budget) and self._seconds(budget) <= slowest

        return _largest(holds, 1, DEFAULT_MAX_BATCH) or 1

    def _seconds(self, budget: Budget) -> float:
        running = self.running(budget)
        return token_seconds(place(self.sites, self.request.devices, running), self.sites, running)


def presets_by_quality(request: PlanRequest) -> list[QuantPreset]:
    """The presets that "auto" chooses from on the first device, the best first."""
    return [PRESETS[name] for name in _BY_QUALITY[request.devices[0].kind]]


def _draft_sizing(request: PlanRequest) -> Sizing | None:
    """Of the other model that guesses, where one does."""
    model = None if request.draft is None else request.draft.model
    if model is None:
        return None
    assert model.preset is not None
    return Sizing(model, model.preset)


def _with_draft(sites: WeightSites, weight_bytes: int) -> WeightSites:
    """With another model's weights beside the embedding."""
    beside = sites.embedding.get("draft", 0) + weight_bytes
    return replace(sites, embedding={**sites.embedding, "draft": beside})


def _banks(
    request: PlanRequest, preset: QuantPreset, estimated: WeightSites, *, native: bool
) -> tuple[StreamedBank, ...]:
    """Of experts that stream. In panels they have a shape of their own; elsewhere what a build has found counts."""
    stored = None if request.is_stored_quantised else DTYPE_BYTES[request.stored_dtype or request.dtype]
    banks = streamed_banks(
        request.spec,
        preset,
        bytes_per_value=DTYPE_BYTES[request.dtype],
        bytes_per_stored_value=stored,
        native=native,
    )
    if request.weights is None or native:
        return banks
    parts, exact = estimated.total(), request.weights
    return tuple(
        replace(
            bank,
            code_bytes=share(bank.code_bytes, "routed_experts", parts, exact),
            scale_bytes=share(bank.scale_bytes, "scales", parts, exact),
        )
        for bank in banks
    )


def _largest(holds: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` for which it holds, 0 if for none."""
    if holds(most):
        return most
    if most <= least or not holds(least):
        return 0
    low, high = least, most  # holds for low, not for high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
