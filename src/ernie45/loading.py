"""The composition root: a name becomes a folder, a spec, a plan, a backend, a runner."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ernie45.backends.base import Backend, ExpertCounter, RoutingBackend, StreamingBackend
from ernie45.backends.compiled import compile_layers
from ernie45.backends.registry import Architecture, find_architecture
from ernie45.checkpoint.adapter import Adapter, read_adapter
from ernie45.checkpoint.gptq_config import read_gptq_config
from ernie45.checkpoint.headers import read_weight_map
from ernie45.checkpoint.open import Checkpoint, open_checkpoint, open_source, read_config
from ernie45.checkpoint.origin import Origin
from ernie45.checkpoint.passing_thread import on_passing_thread
from ernie45.checkpoint.progress import byte_progress
from ernie45.checkpoint.resolve import resolve
from ernie45.devices import check_dtype_name, choose_device, choose_dtype
from ernie45.drafts import build_speculation, check_head, find_draft
from ernie45.dry_build import DryBuild, dry_build
from ernie45.engine.speculation.speculation import Speculation
from ernie45.errors import InvalidRequestError, ModelNotFoundError, UnsupportedError
from ernie45.experts.trace import RoutingLog
from ernie45.kernels.bitsandbytes import check_bitsandbytes
from ernie45.memory.budget import DTYPE_BYTES, KVDtype, MemoryLimit, check_kv_dtype, parse_limits
from ernie45.memory.draft import Draft, check_draft, is_model, naming_draft
from ernie45.memory.estimate import estimate_sites
from ernie45.memory.machine import host_bytes
from ernie45.memory.placement import DeviceMemory, within_host
from ernie45.memory.plan import MemoryPlan
from ernie45.memory.planner import make_plan
from ernie45.memory.remedies import refusal
from ernie45.memory.sizing import DraftNeeds, PlanRequest
from ernie45.planning import draft_preset, has_native_kernels, settle_preset, stored_preset, usable_devices
from ernie45.presets import PRESETS, QuantPreset, find_preset
from ernie45.prompting import VisionInput
from ernie45.prompting.vision_input import read_vision_input
from ernie45.runners.base import Runner
from ernie45.runners.local import LocalRunner
from ernie45.spec import DtypeName, GenerationDefaults, ModelSpec
from ernie45.text_side import find_stop_token_ids, load_text_side, read_generation_defaults
from ernie45.tokenizer import ChatTemplate, Tokenizer
from ernie45.types.limits import MediaLimits
from ernie45.types.placement import Placement
from ernie45.types.reports import IgnoredTensor, LoadReport
from ernie45.types.stats import ModelStats, StageClock

_DTYPE_NAMES: Mapping[torch.dtype, DtypeName] = MappingProxyType(
    {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """Everything the facade needs. `tokenizer` and `template` are None for a folder without tokenizer files, `vision`
    for a model that reads text only, `plan` for one that runs a script, `speculation` without a draft. There are
    `expert_caches` where routed experts are read while it runs, and `routing` where there are any."""

    name: str
    spec: ModelSpec
    runner: Runner
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: GenerationDefaults
    stop_token_ids: frozenset[int]
    context_tokens: int
    report: LoadReport
    vision: VisionInput | None = None
    plan: MemoryPlan | None = None
    stats: ModelStats | None = None
    speculation: Speculation | None = None
    expert_caches: Sequence[ExpertCounter] = ()
    routing: RoutingLog | None = None
    origin: Origin | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a checkpoint is to be loaded: the arguments of `ErnieModel.from_pretrained`, where they are explained."""

    quantization: str | QuantPreset
    device: str
    dtype: str
    memory: MemoryLimit | None
    context_tokens: int | None
    max_batch: int | None
    kv_dtype: KVDtype
    prefix_cache: bool
    compile: bool
    draft: Draft
    adapter: str | os.PathLike[str] | None
    max_pixels: int | None
    media_limits: MediaLimits | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    token: str | None
    progress: bool


def load(name_or_path: str | os.PathLike[str], options: LoadOptions) -> LoadedModel:
    """Find a checkpoint, downloading it where need be, and load it. See `ErnieModel.from_pretrained`."""
    find_preset(options.quantization)
    check_dtype_name(options.dtype)
    check_kv_dtype(options.kv_dtype)
    check_draft(options.draft)
    choose_device(options.device)
    devices = within_host(usable_devices(options.device, parse_limits(options.memory)), host_bytes().most_bytes)
    for device in devices:
        choose_device(device.name)
    lora = None if options.adapter is None else read_adapter(_adapter_folder(options.adapter))
    clock = StageClock()
    with clock.stage("find"):
        folder, draft_folder = _find(name_or_path, options, devices)
    with clock.stage("check"):
        draft = None if draft_folder is None else _check_draft_model(draft_folder, options, devices)
        checked = _check(folder, str(name_or_path), options, devices=devices, adapter=lora, draft=draft)
        _check_plan(checked.dry.plan, options)
    return _load_checked(checked, draft, str(name_or_path), options, clock)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """A folder that can be loaded as asked, before a weight is read."""

    architecture: Architecture
    checkpoint: Checkpoint
    adapter: Adapter | None
    defaults: GenerationDefaults
    vision: VisionInput | None
    device: torch.device
    dry: DryBuild
    ignored: tuple[IgnoredTensor, ...]
    origin: Origin


def _check(
    folder: Path,
    name: str,
    options: LoadOptions,
    *,
    devices: tuple[DeviceMemory, ...],
    adapter: Adapter | None,
    draft: _Checked | None = None,
    can_stream: bool = True,
) -> _Checked:
    """Everything that can be checked without reading a weight."""
    config = read_config(folder)
    architecture = find_architecture(config)
    spec = architecture.parse_spec(config)
    _check_preset(architecture, spec, options)
    checkpoint = open_checkpoint(folder, config, spec)
    defaults = read_generation_defaults(folder)
    device = torch.device(devices[0].name)
    vision = _vision_input(folder, spec, options, device)
    stored = spec.dtype or checkpoint.index.main_dtype
    request = _request(name, config, spec, options, devices=devices, stored_dtype=stored, vision=vision)
    request = replace(request, draft=_draft_needs(options, draft), can_stream=can_stream)
    check_head(options.draft, architecture.build, checkpoint.index.tensors, folder)
    dry = dry_build(architecture, checkpoint, adapter, request, mtp=options.draft == "mtp")
    ignored = checkpoint.account_for(dry.survey.unread())
    return _Checked(
        architecture=architecture,
        checkpoint=checkpoint,
        adapter=adapter,
        defaults=defaults,
        vision=vision,
        device=device,
        dry=dry,
        ignored=ignored,
        origin=Origin.of(checkpoint, dry.options.preset, adapter, dry.options.dtype),
    )


def _load_checked(
    checked: _Checked, draft: _Checked | None, name: str, options: LoadOptions, clock: StageClock
) -> LoadedModel:
    checkpoint, spec, dry, plan = checked.checkpoint, checked.checkpoint.spec, checked.dry, checked.dry.plan
    with clock.stage("tokenizer"):
        tokenizer, template = load_text_side(checkpoint.folder, spec)
    backend = _build(checked, options, clock)
    with naming_draft(options.draft):
        draft_backend = None if draft is None else _build(_beside(draft, plan), options, clock)
    with clock.stage("engine"):
        speculation = build_speculation(options.draft, backend, draft_backend, plan, options.kv_dtype)
        runner = LocalRunner(
            backend,
            num_slots=plan.max_batch,
            context_tokens=plan.context_tokens,
            num_token_ids=tokenizer.size if tokenizer is not None else spec.vocab_size,
            kv_dtype=options.kv_dtype,
            placement=plan.placement,
            prefix_cache=options.prefix_cache,
            speculation=speculation,
        )
    stats = ModelStats(load_stages=clock.seconds, read_bytes=dry.read_bytes)
    return LoadedModel(
        name=name,
        spec=spec,
        runner=runner,
        tokenizer=tokenizer,
        template=template,
        vision=checked.vision,
        defaults=checked.defaults,
        stop_token_ids=find_stop_token_ids(spec, checked.defaults, tokenizer),
        context_tokens=plan.context_tokens,
        plan=plan,
        stats=stats,
        speculation=speculation,
        expert_caches=backend.expert_caches if isinstance(backend, StreamingBackend) else (),
        routing=backend.routing if isinstance(backend, RoutingBackend) else None,
        origin=checked.origin,
        report=LoadReport(
            folder=str(checkpoint.folder),
            layout=checkpoint.layout.name,
            read=dry.survey.read(),
            weight_bytes=plan.weight_bytes,
            weight_parts={str(part): num_bytes for part, num_bytes in dry.weights.items()},
            preset=plan.preset,
            planned_peak_bytes=plan.peak_bytes,
            load_seconds=stats.load_seconds,
            device=str(checked.device),
            dtype=plan.dtype,
            ignored=checked.ignored,
            unknown_config_keys=spec.unknown_keys,
            adapter=None if checked.adapter is None else str(checked.adapter.folder),
            max_pixels=None if checked.vision is None else checked.vision.max_pixels,
        ),
    )


def _request(
    name: str,
    config: Mapping[str, Any],
    spec: ModelSpec,
    options: LoadOptions,
    *,
    devices: tuple[DeviceMemory, ...],
    stored_dtype: DtypeName,
    vision: VisionInput | None,
) -> PlanRequest:
    """What there is to plan, before the headers say how much it is."""
    stored = stored_preset(config)
    dtype = choose_dtype(options.dtype, checkpoint=stored_dtype, device=torch.device(devices[0].name))
    return PlanRequest(
        model=name,
        spec=spec,
        preset=settle_preset(find_preset(options.quantization), stored),
        dtype=_DTYPE_NAMES[dtype],
        kv_dtype=options.kv_dtype,
        context_tokens=options.context_tokens,
        max_batch=options.max_batch,
        devices=devices,
        has_own_head=spec.tied is False,
        stored_dtype=stored_dtype,
        free_disk_bytes=parse_limits(options.memory).disk_bytes,
        max_pixels=None if vision is None else vision.max_pixels,
        is_stored_quantised=stored is not None,
        native=has_native_kernels(devices, stored),
    )


def _find(
    name_or_path: str | os.PathLike[str], options: LoadOptions, devices: tuple[DeviceMemory, ...]
) -> tuple[Path, Path | None]:
    """The folders of the model and of one that guesses, downloaded where need be. What configs and tokenizers tell is
    checked before the weights of either are fetched."""
    fetch = partial(
        resolve,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        token=options.token,
        progress=options.progress,
    )
    drafts: dict[Path, Path | None] = {}

    def check(folder: Path) -> None:
        _check_config(folder, str(name_or_path), options, devices=devices)
        drafts[folder] = find_draft(options.draft, folder, fetch)

    folder = fetch(name_or_path, revision=options.revision, check=check)
    if is_model(options.draft) and folder not in drafts:  # the model was not fetched
        check(folder)
    return folder, drafts.get(folder)


def _draft_needs(options: LoadOptions, draft: _Checked | None = None) -> DraftNeeds | None:
    if options.draft is None:
        return None
    return DraftNeeds(model=None if draft is None else draft.dry.request, mtp=options.draft == "mtp")


def _check_draft_model(folder: Path, options: LoadOptions, devices: tuple[DeviceMemory, ...]) -> _Checked:
    """A model that guesses. Whether there is room for it, the plan of the other says, which counts it."""
    with naming_draft(options.draft):
        asked, stored = find_preset(options.quantization), stored_preset(read_config(folder))
        options = replace(
            options,
            draft=None,
            quantization=draft_preset(asked, devices[0], stored) or "auto",
            context_tokens=None,
            max_batch=1,
            max_pixels=None,
            media_limits=None,
        )
        return _check(folder, str(folder), options, devices=devices[:1], adapter=None, can_stream=False)


def _beside(draft: _Checked, plan: MemoryPlan) -> _Checked:
    """The draft with room for the contexts of a plan, beside the embedding of its model."""
    spec = draft.checkpoint.spec
    options = replace(
        draft.dry.options,
        placement=Placement.on(plan.placement.embedding, spec.num_layers),
        context_tokens=min(plan.context_tokens, spec.max_context_tokens),
    )
    return replace(draft, dry=replace(draft.dry, options=options))


def _build(checked: _Checked, options: LoadOptions, clock: StageClock) -> Backend:
    """Read the weights, check that they are what was planned, and compile the layers."""
    checkpoint, dry, build = checked.checkpoint, checked.dry, checked.architecture.build
    preset, adapter = dry.options.preset, checked.adapter
    if {"nf4", "bnb-int8"} & {preset.experts, preset.linear}:
        for name in dry.plan.placement.devices:
            check_bitsandbytes(torch.device(name))
    loading = f"Loading {checkpoint.folder.name}"
    with clock.stage("weights"), byte_progress(loading, dry.read_bytes, show=options.progress) as advance:
        backend = on_passing_thread(
            lambda advance: build(checkpoint.spec, open_source(checkpoint, adapter, advance=advance), dry.options),
            advance,
        )
    if Counter(backend.weight_bytes) != Counter(dry.weights):
        raise RuntimeError(
            f"a bug in {type(backend).__module__}.{type(backend).__qualname__}, please report it: the weights of "
            f"{checkpoint.folder} take {dict(backend.weight_bytes)} bytes, but on the 'meta' device {dict(dry.weights)}"
        )
    if options.compile:
        compile_layers(backend, dry.options.placement, clock, show=options.progress)
    return backend


def _adapter_folder(adapter: str | os.PathLike[str]) -> Path:
    if not isinstance(adapter, (str, os.PathLike)) or not str(adapter).strip():
        raise InvalidRequestError(
            f"adapter= is {adapter!r}, which names no folder", hint="give the folder of an adapter that PEFT saved"
        )
    folder = Path(os.path.expanduser(adapter))
    if "\0" in str(folder) or not folder.is_dir():
        raise ModelNotFoundError(
            f"there is no adapter folder {str(folder)!r}",
            hint="adapters are not fetched: download it, and give its folder",
        )
    return folder


def _check_config(folder: Path, name: str, options: LoadOptions, *, devices: tuple[DeviceMemory, ...]) -> None:
    """What config.json alone tells, before weights are fetched; what does not fit even by the least that they can take
    is refused."""
    config = read_config(folder)
    architecture = find_architecture(config)
    spec = architecture.parse_spec(config)
    _check_preset(architecture, spec, options)
    check_head(options.draft, architecture.build, read_weight_map(folder), folder)
    if not architecture.follows_options:  # what it takes, only a build shows
        return
    vision = _vision_input(folder, spec, options, torch.device(devices[0].name))
    stored = spec.dtype or "bfloat16"
    request = _request(name, config, spec, options, devices=devices, stored_dtype=stored, vision=vision)
    request = replace(request, draft=_draft_needs(options))
    if read_gptq_config(config) is not None and request.preset is not None:  # its scales may be smaller than ours
        sites = estimate_sites(
            spec, request.preset, bytes_per_value=DTYPE_BYTES[request.dtype], has_own_head=request.has_own_head
        )
        request = replace(request, weights={**sites.total(), "scales": 0})
    _check_plan(make_plan(request), options)


def _check_preset(architecture: Architecture, spec: ModelSpec, options: LoadOptions) -> None:
    preset = find_preset(options.quantization)
    if not architecture.follows_options and preset not in (None, PRESETS["none"]):
        raise UnsupportedError(
            f"quantization={preset.name!r} was asked for, but the backend registered for model_type "
            f"{spec.model_type!r} does not quantise",
            hint="leave quantization= out",
        )


def _check_plan(plan: MemoryPlan, options: LoadOptions) -> None:
    if plan.verdict == "does not fit":
        raise refusal(plan, parse_limits(options.memory), host_bytes())


def _vision_input(folder: Path, spec: ModelSpec, options: LoadOptions, device: torch.device) -> VisionInput | None:
    return read_vision_input(
        folder,
        spec,
        on_cpu=device.type == "cpu",
        max_pixels=options.max_pixels,
        media_limits=options.media_limits,
    )
