"""`plan_memory`: from a name, a config or a folder to a MemoryPlan, without torch where no GPU is asked about."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie45 import catalogue
from ernie45.checkpoint.gptq_config import GptqConfig, read_gptq_config, with_quantize_config
from ernie45.checkpoint.headers import CheckpointIndex, read_headers, read_json
from ernie45.checkpoint.packed_config import read_packed_config
from ernie45.checkpoint.quantized_releases import refuse_by_config, refuse_by_name, refuse_by_tensors
from ernie45.checkpoint.resolve import named_folder
from ernie45.errors import InvalidRequestError, ModelNotFoundError, UnsupportedError
from ernie45.kernels.library import native_library
from ernie45.memory.budget import (
    CPU_MAX_PIXELS,
    DTYPE_BYTES,
    KVDtype,
    Limits,
    MemoryLimit,
    check_kv_dtype,
    parse_limits,
)
from ernie45.memory.draft import Draft, check_draft, check_draft_spec, check_mtp, has_mtp_head, is_model, naming_draft
from ernie45.memory.estimate import PartBytes, stored_weights
from ernie45.memory.machine import has_cuda_driver, host_bytes
from ernie45.memory.placement import DeviceMemory
from ernie45.memory.plan import MemoryPlan
from ernie45.memory.planner import choose_preset, make_plan, with_speed
from ernie45.memory.sizing import DraftNeeds, PlanRequest
from ernie45.memory.streaming import NOMINAL_DISK_RATE, RecordedRouting, check_routing
from ernie45.presets import PRESETS, QuantPreset, find_preset
from ernie45.spec import DTYPE_NAMES, DtypeName, ModelSpec, parse_spec

if TYPE_CHECKING:
    from ernie45.experts.trace import RoutingTrace

_DEVICE_NAME = re.compile(r"auto|mps|(cpu|cuda)(:\d+)?")
# oneDNN computes in bfloat16 where the processor has these instructions, or Arm's "bf16".
_BFLOAT16_FLAGS = {"avx512bw", "avx512vl", "avx512dq"}
_GPTQ = QuantPreset(name="gptq", experts="int4", linear="int4")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """What planning wants to know; `stored` is how the files are quantised already. `folder` is where the files are,
    and `index` what their headers say, None where only a config is known."""

    name: str
    spec: ModelSpec
    dtype: DtypeName
    has_own_head: bool
    stored: QuantPreset | None = None
    gptq: GptqConfig | None = None
    folder: Path | None = None
    index: CheckpointIndex | None = None
    notes: tuple[str, ...] = ()


def plan_memory(
    name_or_path: str | os.PathLike[str] | Mapping[str, Any],
    *,
    quantization: str | QuantPreset = "auto",
    device: str = "auto",
    dtype: str = "auto",
    memory: MemoryLimit | None = None,
    context_tokens: int | None = None,
    max_batch: int | None = None,
    kv_dtype: KVDtype = "auto",
    draft: Draft = None,
    routing: RoutingTrace | None = None,
) -> MemoryPlan:
    """What a model would take in memory, and whether it fits, before anything is fetched or read.

    `name_or_path` is a catalogue name (no network is used), the content of a config.json, or a checkpoint's folder.
    `routing` is what `model.trace_routing` recorded, which says how many experts a token finds in memory where they
    stream. The other arguments are those of `ErnieModel.from_pretrained`; devices named in `memory` need not be there.

    Raises:
        ModelNotFoundError: no such name or folder.
        CheckpointError: a config or folder that cannot be read.
        UnsupportedError: a device or dtype that is unknown, weights whose quantisation is not read, or draft="mtp" and
            no such head.
        InvalidRequestError: an argument of the wrong kind or range, a draft that cannot guess for this model, or the
            routing of another one.
    """
    check_draft(draft)
    preset = find_preset(quantization)
    check_kv_dtype(kv_dtype)
    limits = parse_limits(memory)
    devices = usable_devices(device, limits)
    model = _describe(name_or_path)
    request = _request(model, preset, dtype=dtype, kv_dtype=kv_dtype, devices=devices, mtp=draft == "mtp")
    request = replace(request, context_tokens=context_tokens, max_batch=max_batch, free_disk_bytes=limits.disk_bytes)
    if draft == "mtp":
        check_mtp(is_text=model.spec.vision is None, has_head=_has_mtp(model), model=model.name)
    if routing is not None:
        request = replace(request, routing=_recorded(routing, model))
    if draft is not None:
        request = replace(request, draft=_draft_needs(draft, preset, request, dtype=dtype))
    return measured(make_plan(request), model.folder)


def _request(
    model: _Model,
    preset: QuantPreset | None,
    *,
    dtype: str,
    kv_dtype: KVDtype,
    devices: tuple[DeviceMemory, ...],
    mtp: bool = False,
) -> PlanRequest:
    """What there is to plan, with context and batch open and nothing that guesses; `mtp` is whether that counts weights
    that are stored quantised of the head for multi-token prediction."""
    planned, notes = _planned_dtype(dtype, model.dtype, devices[0])
    return PlanRequest(
        model=model.name,
        spec=model.spec,
        preset=settle_preset(preset, model.stored),
        dtype=planned,
        kv_dtype=kv_dtype,
        context_tokens=None,
        max_batch=None,
        devices=devices,
        has_own_head=model.has_own_head,
        stored_dtype=model.dtype,
        weights=_stored_weights(model, DTYPE_BYTES[planned], mtp=mtp),
        max_pixels=_max_pixels(model, on_cpu=devices[0].kind == "cpu"),
        is_stored_quantised=model.stored is not None,
        native=has_native_kernels(devices, model.stored),
        notes=(*model.notes, *notes),
    )


def _draft_needs(draft: Draft, preset: QuantPreset | None, model: PlanRequest, *, dtype: str) -> DraftNeeds:
    if draft is None or not is_model(draft):
        return DraftNeeds(mtp=draft == "mtp")
    with naming_draft(draft):
        described = _describe(draft)
        check_draft_spec(model.spec, described.spec)
        asked = draft_preset(preset, model.devices[0], described.stored)
        request = _request(described, asked, dtype=dtype, kv_dtype=model.kv_dtype, devices=model.devices[:1])
        return DraftNeeds(model=replace(request, preset=request.preset or choose_preset(request)))


def _recorded(routing: RoutingTrace, model: _Model) -> RecordedRouting:
    from ernie45.experts.trace import RoutingTrace  # here, because numpy takes a while

    if not isinstance(routing, RoutingTrace):
        raise InvalidRequestError(
            f"routing= must be a RoutingTrace, not {type(routing).__name__}", hint="RoutingTrace.load reads a file"
        )
    recorded = RecordedRouting(
        num_tokens=routing.num_tokens(),
        num_layers=len(routing.layers),
        num_experts=routing.num_experts,
        num_chosen=routing.chosen.shape[1],
        hit_rate=routing.replay,
    )
    check_routing(recorded, model.spec, model.name)
    return recorded


def draft_preset(asked: QuantPreset | None, device: DeviceMemory, stored: QuantPreset | None) -> QuantPreset | None:
    """Of a model that guesses on `device`, where `asked` is that of the model it guesses for: the same, unless its
    files are `stored` quantised. An open one becomes int8 on a CPU: only speed depends on a draft's quality."""
    if stored is not None:
        return PRESETS["none"]
    return PRESETS["int8"] if asked is None and device.kind == "cpu" else asked


def _has_mtp(model: _Model) -> bool:
    """Whether there is a head for multi-token prediction: as the files say, else the config."""
    if model.index is None:
        return model.spec.num_mtp_layers > 0
    return has_mtp_head(model.index.tensors)


def measured(plan: MemoryPlan, folder: Path | None = None) -> MemoryPlan:
    """The plan with the speed that this machine's memory allows, and for experts that stream the disk that `folder` is
    on, each measured once in a process (0.1 and 0.3 s); as it was where it is for more memory than this machine has,
    for other devices, or does not fit. Without a folder the disk is taken for one of `NOMINAL_DISK_RATE`."""
    capacity_bytes = sum(device.capacity_bytes for device in plan.devices)
    if plan.verdict == "does not fit" or capacity_bytes > host_bytes().total_bytes:
        return plan

    def measure_rate() -> float:
        # Imported here because numpy takes a while, and only a plan that fits is asked for its speed.
        from ernie45.memory.bandwidth import copy_rate

        return copy_rate()

    def measure_disk_rate() -> float:
        if folder is None:
            return NOMINAL_DISK_RATE
        from ernie45.memory.disk_rate import disk_rate  # as above

        return disk_rate(folder)

    plan = with_speed(plan, measure_rate, measure_disk_rate)
    if plan.disk_read_rate is None or folder is not None:
        return plan
    assumed = f"The disk was not measured, but taken for one that reads {NOMINAL_DISK_RATE / 1e9:.1f} GB/s."
    return replace(plan, notes=(*plan.notes, assumed))


def stored_preset(config: Mapping[str, Any]) -> QuantPreset | None:
    """How a config.json says that the weights are quantised already; None where they are not.

    Raises:
        UnsupportedError: in a way that is not read.
        ConfigError: an entry of the wrong type.
    """
    return read_packed_config(config) or (None if read_gptq_config(config) is None else _GPTQ)


def has_native_kernels(devices: tuple[DeviceMemory, ...], stored: QuantPreset | None) -> bool:
    """Whether the native kernels serve CPUs among these devices, and weights `stored` so: they do not know GPTQ's
    codes."""
    return any(one.kind == "cpu" for one in devices) and stored != _GPTQ and native_library() is not None


def settle_preset(asked: QuantPreset | None, stored: QuantPreset | None) -> QuantPreset | None:
    """The preset of weights that may be `stored` quantised; None where it is still open.

    Raises:
        UnsupportedError: another preset than the stored one was asked for.
    """
    if stored is None:
        return asked
    if asked is None or asked in (PRESETS["none"], stored):
        return stored
    stored_as = repr(stored.name if asked.name != stored.name else stored)
    raise UnsupportedError(
        f"quantization={asked.name!r} cannot be had of weights that are stored as {stored_as}",
        hint="leave it out, or load the unquantised checkpoint of this model",
    )


def usable_devices(device: str, limits: Limits) -> tuple[DeviceMemory, ...]:
    """The devices that `device=` and `memory=` allow, with what may be used of each, accelerators first.

    Accelerators are those that `limits` names, else those that are there; the CPU is used beside them unless only they
    are named, and by itself with "cpu". A limit of "cpu" is that of "cpu:1" too.

    Raises:
        UnsupportedError: not a device, or none that is there.
        InvalidRequestError: `limits` names devices, but none that `device` allows.
    """
    if not isinstance(device, str) or not _DEVICE_NAME.fullmatch(device):
        raise UnsupportedError(
            f"device {device!r} is not a device name", hint="use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
        )
    on_cpu = device.startswith("cpu")
    named = [DeviceMemory(name=name, capacity_bytes=size) for name, size in limits.devices.items()]
    named.sort(key=lambda one: (one.kind, int(one.name.partition(":")[2] or 0)))
    cpus = [one for one in named if one.kind == "cpu"]
    if device.startswith("cpu:"):
        cpus = [replace(one, name=device) for one in cpus if one.name in ("cpu", device)]
    accelerators = [one for one in named if one.kind != "cpu" and device in ("auto", one.kind, one.name)]
    if named and not cpus and not accelerators:
        raise InvalidRequestError(
            f"memory= names {', '.join(one.name for one in named)}, but device={device!r} allows none of them",
            hint=f"name {device!r} in memory=, or leave it out for what is free",
        )
    if not cpus and not accelerators:
        cpus = [DeviceMemory(name=device if on_cpu else "cpu", capacity_bytes=host_bytes().available_bytes)]
    if not accelerators and not on_cpu:
        accelerators = _present_accelerators(device)
    if any(one.kind == "mps" for one in accelerators):  # which shares the CPU's memory
        return tuple(accelerators)
    return (*accelerators, *cpus)


def _present_accelerators(device: str) -> list[DeviceMemory]:
    """Asks torch, for "auto" only where there may be one."""
    if device == "auto" and not has_cuda_driver() and sys.platform != "darwin":
        return []
    import torch  # here, because planning for a CPU goes without

    from ernie45.devices import choose_device, free_bytes

    chosen = choose_device(device)
    names = [str(chosen)]
    if chosen.type == "cpu":
        return []
    if chosen.type == "cuda" and chosen.index is None:
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [DeviceMemory(name=name, capacity_bytes=free_bytes(torch.device(name))) for name in names]


def _describe(name_or_path: str | os.PathLike[str] | Mapping[str, Any]) -> _Model:
    if isinstance(name_or_path, Mapping):
        return _from_config(name_or_path, "config")
    folder = named_folder(name_or_path)
    if folder is not None:
        return _from_folder(folder)
    name = str(name_or_path).strip()
    entry = catalogue.find(name)
    if entry is None:
        raise ModelNotFoundError(
            f"there is no folder and no known model {name!r:.200}",
            hint=catalogue.did_you_mean(name)
            or "give a checkpoint's folder, or the content of its config.json; planning fetches nothing",
        )
    notes = []
    try:
        refuse_by_name(entry.name)
    except UnsupportedError as error:
        notes.append(f"This plan is for the weights in bfloat16. Loading is refused: {error.message}.")
    spec = entry.spec
    return _Model(
        name=entry.name,
        spec=spec,
        dtype=spec.dtype or "bfloat16",
        has_own_head=not spec.tied,
        folder=catalogue.built_in_folder(entry) if entry.built_in else None,
        notes=tuple(notes),
    )


def _from_config(config: Mapping[str, Any], name: str) -> _Model:
    refuse_by_config(config, name)
    spec = parse_spec(config)
    return _Model(
        name=name,
        spec=spec,
        dtype=spec.dtype or "bfloat16",
        has_own_head=not spec.tied,
        stored=stored_preset(config),
        gptq=read_gptq_config(config),
    )


def _from_folder(folder: Path) -> _Model:
    config = with_quantize_config(read_json(folder / "config.json"), folder)
    model = _from_config(config, str(folder))
    index = read_headers(folder)
    refuse_by_tensors(index)
    return replace(
        model,
        dtype=model.spec.dtype or index.main_dtype,
        has_own_head=_has_own_head(index, model.spec),
        folder=folder,
        index=index,
    )


def _stored_weights(model: _Model, bytes_per_value: int, *, mtp: bool) -> PartBytes | None:
    """What files that are quantised already hold; the estimate is exact for others."""
    if model.index is None or model.stored is None:
        return None
    return stored_weights(
        model.index, bytes_per_value=bytes_per_value, has_own_head=model.has_own_head, gptq=model.gptq, mtp=mtp
    )


def _max_pixels(model: _Model, *, on_cpu: bool) -> int | None:
    """The limit on a picture that loading would set: the processor files', lower on a CPU; None for the published one.

    Read here and not by `vision.read_settings`, which brings in torch.
    """
    if model.spec.vision is None:
        return None
    limits = [CPU_MAX_PIXELS] if on_cpu else []
    if model.folder is not None:
        path, combined = model.folder / "preprocessor_config.json", model.folder / "processor_config.json"
        image = read_json(combined).get("image_processor") if combined.is_file() else None
        image = image or (read_json(path) if path.is_file() else {})
        size = image.get("size") if isinstance(image, dict) else None
        # What is malformed, loading refuses.
        sections = [section for section in (image, size) if isinstance(section, dict)]
        said = [section.get(key) for section in sections for key in ("max_pixels", "longest_edge")]
        limits += [value for value in said if type(value) is int and value > 0]
    return min(limits, default=None)


def _has_own_head(index: CheckpointIndex, spec: ModelSpec) -> bool:
    """As opening the checkpoint decides it: a stored head is used, unless it equals the embedding."""
    head = index.tensors.get("lm_head.weight")
    if head is None:
        return spec.tied is False or "lm_head.codes" in index.tensors
    embedding = next((info for name, info in index.tensors.items() if name.endswith("embed_tokens.weight")), None)
    if spec.tied is False or embedding is None:
        return True
    from ernie45.checkpoint.read import hold_the_same  # here, because it brings in torch

    return not hold_the_same(head, embedding)


def _planned_dtype(asked: str, checkpoint: DtypeName, device: DeviceMemory) -> tuple[DtypeName, tuple[str, ...]]:
    """The dtype that loading would take on `device`, and what there is to say about it."""
    if asked != "auto":
        known = next((name for name in DTYPE_NAMES if name == asked), None)
        if known is None:
            raise UnsupportedError(
                f"dtype {asked!r} is unknown", hint=f"use 'auto', {', '.join(map(repr, DTYPE_NAMES))}"
            )
        return known, ()
    if device.kind != "cpu" or checkpoint == "float32" or (checkpoint == "bfloat16" and has_bfloat16_arithmetic()):
        return checkpoint, ()
    return "float32", (
        f"The weights are {checkpoint}, in which this CPU does not compute: they are loaded as float32.",
    )


def has_bfloat16_arithmetic(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU computes in bfloat16, as oneDNN decides it; False where the system does not say."""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return flags >= _BFLOAT16_FLAGS or "bf16" in flags
