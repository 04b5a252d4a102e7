"""Saving a model: its checkpoint is read once more and quantised matrix by matrix, so that it takes little memory and
does not depend on the form in which this processor keeps the weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ernie45.backends.base import BuildOptions
from ernie45.backends.registry import Architecture, find_architecture
from ernie45.checkpoint.adapter import Adapter
from ernie45.checkpoint.open import Checkpoint, open_checkpoint, open_survey, read_config
from ernie45.checkpoint.origin import Origin
from ernie45.checkpoint.packing import PackPlan, plan_packing, write_packed
from ernie45.checkpoint.passing_thread import on_passing_thread
from ernie45.checkpoint.progress import byte_progress
from ernie45.checkpoint.read import TensorSource
from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES, destination_folder
from ernie45.errors import TensorError, UnsupportedError
from ernie45.memory.draft import has_mtp_head
from ernie45.presets import QuantPreset
from ernie45.types.placement import Placement


def save_loaded(origin: Origin | None, folder: str | os.PathLike[str], *, progress: bool) -> None:
    """Write the model that was loaded from `origin`, None for a scripted one. See `ErnieModel.save_pretrained`."""
    if origin is None:
        raise UnsupportedError("a scripted model has no weights to save", hint="save one that was loaded")
    destination = destination_folder(folder)
    origin.check_unchanged()
    save_checkpoint(
        origin.folder, destination, origin.preset, adapter=origin.adapter, dtype=origin.dtype, progress=progress
    )


def save_checkpoint(
    source: Path,
    folder: Path,
    preset: QuantPreset,
    *,
    adapter: Adapter | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool,
) -> PackPlan:
    """Write what `plan_saving` plans to a new or empty folder. Returns what was written.

    Raises:
        InvalidRequestError: the folder is not empty, or lies in the source.
        CheckpointError: a full disk; and as `plan_saving` does.
    """
    plan = plan_saving(source, preset, adapter=adapter, dtype=dtype, max_shard_bytes=max_shard_bytes)
    with byte_progress(f"Saving {folder.name}", plan.files.weight_bytes, show=progress) as advance:
        on_passing_thread(lambda advance: write_packed(plan, folder, advance=advance), advance)
    return plan


def plan_saving(
    source: Path,
    preset: QuantPreset,
    *,
    adapter: Adapter | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> PackPlan:
    """Lay out the checkpoint in `source` with a preset, and an adapter merged. No weight is read.

    The head for multi-token prediction is there where it is whole, whether the model was loaded with it or not.
    `dtype` is what a model computes in: matrices are rounded to it before they are quantised, and adapted tensors are
    stored in it. None is the checkpoint's.

    Raises:
        UnsupportedError: matrices of this preset have no place in files.
        CheckpointError: or one of its kinds: what loading would refuse.
    """
    config = read_config(source)
    architecture = find_architecture(config)
    checkpoint = open_checkpoint(source, config, architecture.parse_spec(config))
    spec = checkpoint.spec
    options = BuildOptions(
        dtype=dtype or getattr(torch, spec.dtype or checkpoint.index.main_dtype),
        placement=Placement.on("meta", spec.num_layers),
        preset=preset,
        context_tokens=1,
    )

    def build(tensors: TensorSource) -> object:
        mtp = _has_whole_head(architecture, checkpoint, adapter, options)
        return architecture.build(spec, tensors, replace(options, mtp=mtp))

    return on_passing_thread(
        lambda advance: plan_packing(
            checkpoint,
            config,
            preset,
            build=build,
            dtype=options.dtype,
            adapter=adapter,
            max_shard_bytes=max_shard_bytes,
        ),
        lambda num_bytes: None,
    )


def _has_whole_head(
    architecture: Architecture, checkpoint: Checkpoint, adapter: Adapter | None, options: BuildOptions
) -> bool:
    """Whether the checkpoint would load with its head for multi-token prediction."""
    if not has_mtp_head(checkpoint.index.tensors):
        return False
    source, _ = open_survey(checkpoint, adapter)
    try:
        architecture.build(checkpoint.spec, source, replace(options, mtp=True))
    except TensorError:  # not swallowed: a fault elsewhere is raised by the build without the head
        return False
    return True
