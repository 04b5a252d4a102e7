"""The composition root: a name becomes a folder, a spec, a backend, a runner."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie45.backends.base import Backend
from ernie45.backends.registry import Architecture, find_architecture
from ernie45.checkpoint.adapter import AdaptedSource, Adapter, read_adapter
from ernie45.checkpoint.headers import read_json
from ernie45.checkpoint.open import open_checkpoint, read_config
from ernie45.checkpoint.progress import Advance, byte_progress
from ernie45.checkpoint.read import TensorReader, TensorSource
from ernie45.checkpoint.resolve import resolve
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.devices import check_dtype_name, choose_device, choose_dtype, free_bytes
from ernie45.errors import ConfigError, InvalidRequestError, ModelNotFoundError, TokenizerError, UnsupportedError
from ernie45.memory.budget import fit, parse_bytes
from ernie45.prompting import VisionInput
from ernie45.runners.base import Runner
from ernie45.runners.local import LocalRunner
from ernie45.spec import GenerationDefaults, ModelSpec, parse_generation_defaults
from ernie45.tokenizer import ChatTemplate, Tokenizer, load_template, load_tokenizer
from ernie45.types.limits import MediaLimits
from ernie45.types.reports import LoadReport
from ernie45.vision import read_settings
from ernie45.vision.timestamps import FONT_NAME

MemoryLimit = str | Mapping[str, str]

_PRESETS_TO_COME = ("int8", "int4", "nf4", "bnb-int8")
# A photo should take the 28B model under a minute on two cores: 12 trillion operations, where 0.26 trillion a second
# were measured on its vision tower. At the published limit it is several minutes; a clip takes long all the same.
CPU_MAX_PIXELS = 1024 * 28 * 28
CPU_MAX_FRAME_PIXELS = 299 * 28 * 28

_END_TOKENS = ("</s>", "<|end_of_sentence|>", "<|im_end|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """Everything the facade needs. `tokenizer` and `template` are None for a folder without tokenizer files, `vision`
    for a model that reads text only."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a checkpoint is to be loaded: the arguments of `ErnieModel.from_pretrained`, where they are explained."""

    quantization: str
    device: str
    dtype: str
    memory: MemoryLimit | None
    context_tokens: int | None
    max_batch: int | None
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
    _check_quantization(options.quantization)
    check_dtype_name(options.dtype)
    device = choose_device(options.device)
    lora = None if options.adapter is None else read_adapter(_adapter_folder(options.adapter))
    memory_limit = _memory_limit(options.memory, device)
    folder = resolve(
        name_or_path,
        revision=options.revision,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        token=options.token,
        progress=options.progress,
        check=_check_config,
    )
    memory_bytes = free_bytes(device) if memory_limit is None else memory_limit
    return _load_folder(folder, str(name_or_path), options, device=device, adapter=lora, memory_bytes=memory_bytes)


def _load_folder(
    folder: Path,
    name: str,
    options: LoadOptions,
    *,
    device: torch.device,
    adapter: Adapter | None,
    memory_bytes: int,
) -> LoadedModel:
    """Everything that can be checked without reading a weight is checked first."""
    started = time.perf_counter()
    config = read_config(folder)
    architecture = find_architecture(config)
    spec = architecture.parse_spec(config)
    checkpoint = open_checkpoint(folder, config, spec)
    index, layout = checkpoint.index, checkpoint.layout
    defaults = _generation_defaults(folder)
    vision = _vision_input(folder, spec, device, options)
    dtype = choose_dtype(options.dtype, checkpoint=spec.dtype or index.main_dtype, device=device)
    survey = HeaderSurvey(index, layout)
    _build_from_headers(architecture, spec, survey, adapter, dtype)
    ignored = checkpoint.account_for(survey.unread())
    budget = fit(
        spec,
        weight_bytes=survey.weight_bytes,
        bytes_per_value=dtype.itemsize,
        memory_bytes=memory_bytes,
        context_tokens=options.context_tokens,
        max_batch=options.max_batch,
    )
    tokenizer, template = _text_side(folder, spec)
    with byte_progress(f"Loading {folder.name}", survey.read_bytes, show=options.progress) as advance:
        backend = _on_passing_thread(
            lambda advance: architecture.build(
                spec,
                _adapted(TensorReader(index, layout, advance=advance), adapter),
                dtype=dtype,
                device=device,
                context_tokens=budget.context_tokens,
            ),
            advance,
        )
    num_token_ids = tokenizer.size if tokenizer is not None else spec.vocab_size
    return LoadedModel(
        name=name,
        spec=spec,
        runner=LocalRunner(
            backend,
            num_slots=budget.max_batch,
            context_tokens=budget.context_tokens,
            num_token_ids=num_token_ids,
        ),
        tokenizer=tokenizer,
        template=template,
        vision=vision,
        defaults=defaults,
        stop_token_ids=_stop_token_ids(spec, defaults, tokenizer),
        context_tokens=budget.context_tokens,
        report=LoadReport(
            folder=str(folder),
            layout=layout.name,
            read=survey.read(),
            weight_bytes=survey.weight_bytes,
            load_seconds=time.perf_counter() - started,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            ignored=ignored,
            unknown_config_keys=spec.unknown_keys,
            adapter=None if adapter is None else str(adapter.folder),
            max_pixels=None if vision is None else vision.max_pixels,
        ),
    )


def _build_from_headers(
    architecture: Architecture, spec: ModelSpec, survey: HeaderSurvey, adapter: Adapter | None, dtype: torch.dtype
) -> None:
    """The build without weights: raises whatever would stop the real one."""
    source = survey if adapter is None else AdaptedSource(survey, adapter)
    architecture.build(spec, source, dtype=dtype, device=torch.device("meta"), context_tokens=1)
    if isinstance(source, AdaptedSource):
        source.check_all_merged()


def _adapted(reader: TensorReader, adapter: Adapter | None) -> TensorSource:
    return reader if adapter is None else AdaptedSource(reader, adapter)


def _on_passing_thread(build: Callable[[Advance], Backend], advance: Advance) -> Backend:
    """Build on a thread that ends with it; an interrupt ends the build at its next `advance`.

    OpenMP keeps a team of workers for each thread that ever computed. With the engine's thread a second team would make
    more workers than cores, and GNU's runtime then lets them sleep between products: 14 tokens/s instead of 20.
    """
    stopping = threading.Event()

    def advance_or_stop(num_bytes: int) -> None:
        if stopping.is_set():
            raise CancelledError
        advance(num_bytes)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ernie45-loading") as pool:
        try:
            return pool.submit(build, advance_or_stop).result()
        except BaseException:
            stopping.set()
            raise


def _vision_input(folder: Path, spec: ModelSpec, device: torch.device, options: LoadOptions) -> VisionInput | None:
    """How the model takes media: as its processor's files say, and with fewer pixels where it runs on a CPU."""
    max_pixels = options.max_pixels
    if not isinstance(options.media_limits, MediaLimits | None):
        raise InvalidRequestError(
            f"media_limits must be MediaLimits, not {type(options.media_limits).__name__}",
            hint="e.g. ernie45.MediaLimits(max_bytes=5_000_000)",
        )
    if spec.vision is None:
        for name, value in (("max_pixels", max_pixels), ("media_limits", options.media_limits)):
            if value is not None:
                raise UnsupportedError(
                    f"{name}= was given, but this model reads text only", hint="leave it out for a text model"
                )
        return None
    settings = read_settings(folder)
    least = settings.factor**2
    if max_pixels is not None and (
        isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < least
    ):
        raise InvalidRequestError(
            f"max_pixels must be a whole number from {least}, not {max_pixels!r}", hint="leave it out for the default"
        )
    if (settings.patch_size, settings.merge_size) != (spec.vision.patch_size, spec.vision.spatial_merge_size):
        raise ConfigError(
            f"the processor's files have patches of {settings.patch_size} pixels, {settings.merge_size} to a side of a"
            f" token, but config.json has {spec.vision.patch_size} and {spec.vision.spatial_merge_size}",
            hint="they belong to another model: fetch the checkpoint's files again",
        )
    font = folder / FONT_NAME
    on_cpu = device.type == "cpu"
    default_pixels = min(settings.max_pixels, CPU_MAX_PIXELS) if on_cpu else settings.max_pixels
    default_frame_pixels = settings.max_frame_pixels
    if on_cpu:
        default_frame_pixels = min(default_frame_pixels, max(settings.min_frame_pixels, CPU_MAX_FRAME_PIXELS))
    return VisionInput(
        settings=settings,
        max_pixels=max_pixels or default_pixels,
        max_frame_pixels=min(max_pixels, settings.max_frame_pixels) if max_pixels else default_frame_pixels,
        limits=options.media_limits or MediaLimits(),
        font=font if font.is_file() else None,
    )


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


def _check_config(folder: Path) -> None:
    config = read_config(folder)
    find_architecture(config).parse_spec(config)


def _check_quantization(quantization: str) -> None:
    if quantization in _PRESETS_TO_COME:
        raise UnsupportedError(
            f"quantization={quantization!r} comes with a later version of ernie45",
            hint="use quantization='none' (which 'auto' means for now)",
        )
    if quantization not in ("auto", "none"):
        raise InvalidRequestError(f"quantization={quantization!r} is unknown", hint="use 'auto' or 'none'")


def _generation_defaults(folder: Path) -> GenerationDefaults:
    path = folder / "generation_config.json"
    return parse_generation_defaults(read_json(path) if path.is_file() else {})


def _memory_limit(memory: MemoryLimit | None, device: torch.device) -> int | None:
    """Bytes the caller allows on `device`; None where no limit is set for it."""
    if memory is None:
        return None
    if not isinstance(memory, Mapping):
        host_bytes = parse_bytes(memory)
        return host_bytes if device.type == "cpu" else None
    for name in memory:
        if not isinstance(name, str) or not re.fullmatch(r"cpu|disk|mps|cuda(:\d+)?", name):
            raise InvalidRequestError(
                f"memory= names {name!r}, which is no device", hint="use 'cpu', 'cuda', 'cuda:1', 'mps' or 'disk'"
            )
    limits = {name: parse_bytes(text) for name, text in memory.items()}
    names = {str(device), f"{device.type}:{device.index or 0}"}
    if not device.index:
        names.add(device.type)
    return next((limit for name, limit in limits.items() if name in names), None)


def _text_side(folder: Path, spec: ModelSpec) -> tuple[Tokenizer | None, ChatTemplate | None]:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None, None
    if tokenizer.size > spec.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.size} tokens, but the model only {spec.vocab_size}",
            hint="the tokenizer files in the folder belong to another model",
        )
    return tokenizer, load_template(folder)


def _stop_token_ids(spec: ModelSpec, defaults: GenerationDefaults, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Replies end with `</s>`; `<|end_of_sentence|>`, which closes turns in a history, ends them as well."""
    named = [tokenizer.token_id(token) for token in _END_TOKENS] if tokenizer is not None else []
    return frozenset((*spec.eos_token_ids, *defaults.eos_token_ids, *(i for i in named if i is not None)))
