"""Writing our own packed format from a checkpoint in any layout, matrix by matrix.

The format: docs/packed-format.md. A plan made from headers fixes every byte range before anything is written, and the
same weights and preset give the same files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, final

import torch
from torch import Tensor

from ernie45.checkpoint.adapter import AdaptedSource, Adapter
from ernie45.checkpoint.headers import INDEX_FILE
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.open import Checkpoint, open_source, open_survey
from ernie45.checkpoint.packed import packed_name
from ernie45.checkpoint.packed_config import matrix_scheme, packed_entries
from ernie45.checkpoint.progress import Advance
from ernie45.checkpoint.read import TORCH_DTYPES, BlockSource, PackedSource, TensorSource
from ernie45.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    PARTIAL_SUFFIX,
    FolderFiles,
    Unit,
    check_apart,
    check_room,
    copied_files,
    disk_errors,
    index_json,
    move_file,
    plan_shards,
    plan_units,
    read_unit,
    sync_folder,
    write_file,
)
from ernie45.errors import InvalidRequestError, UnsupportedError
from ernie45.presets import INT4_GROUP, QuantPreset, Scheme
from ernie45.quantization.packed import Packed, PackedInt8, empty_packed
from ernie45.quantization.quantize import quantize_blocks_into, quantize_into
from ernie45.types.reports import IgnoredTensor

Build = Callable[[TensorSource], object]
"""Builds a model from a source on torch's "meta" device, asking for every tensor it needs in order."""

# config.json: how another layout is told, and code that is not copied.
_LEFT_OUT = ("source", "paddleformers_version", "auto_map", "quantization_config")
_AS_LONG_AS_THE_VOCABULARY = ("model.embed_tokens", "lm_head")
_STORED_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items() if name != "U16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    """A matrix to write packed. `parts` maps its -PT modules to rows; `scheme` is None where it is packed already."""

    parts: Mapping[str, int]
    in_features: int
    scheme: Scheme | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """Tensors that are made at once: those of a packed matrix, one unit each, or a unit that is stored plainly."""

    units: tuple[Unit, ...]
    matrix: _Matrix | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """The files of a packed folder: `shards` with the weights, and `small_files` by name.

    `dtype` is what matrices are read in before they are quantised. `steps` are how the weights are made, in the order
    of a build. `dropped` are stored tensors that the folder does without.
    """

    checkpoint: Checkpoint
    adapter: Adapter | None
    dtype: torch.dtype
    steps: tuple[_Step, ...]
    files: FolderFiles
    dropped: tuple[IgnoredTensor, ...]


def plan_packing(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    preset: QuantPreset,
    *,
    build: Build,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> PackPlan:
    """Lay out what a checkpoint, whose config.json holds `config`, becomes. No weight is read.

    `build` computes in `dtype`. What `preset` does not cover keeps the dtype it is stored in, which is exact; what an
    adapter changes is stored in `dtype`, and config.json then names it. The preset "none" gives a plain -PT folder.

    Raises:
        CheckpointError: or one of its kinds: what loading would refuse.
        UnsupportedError: the preset's matrices have no place in files, or the files are packed with another preset.
    """
    if checkpoint.preset not in (None, preset):
        raise UnsupportedError(
            f"{checkpoint.folder} is packed as {checkpoint.preset.name!r}, and cannot be packed as {preset.name!r}",
            hint="save the unquantised checkpoint that it was made of",
        )
    if checkpoint.gptq is not None and {preset.experts, preset.linear, preset.embedding} != {None}:
        raise UnsupportedError(
            f"quantization={preset.name!r} cannot be had of weights that are stored as 'gptq'",
            hint=f"load {checkpoint.folder} as it is, or save the unquantised checkpoint of this model",
        )
    entries = packed_entries(preset)
    source, survey = open_survey(checkpoint, adapter)
    recorder = _Recorder(checkpoint, source, preset, adapter)
    build(recorder)
    if isinstance(source, AdaptedSource):
        source.check_all_merged()
    dropped = checkpoint.account_for(survey.unread())
    steps = tuple(recorder.steps)
    shards = plan_shards([unit for step in steps for unit in step.units], max_shard_bytes)
    written = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    if adapter is not None:
        written["dtype"] = str(dtype).removeprefix("torch.")
        written.pop("torch_dtype", None)
    elif checkpoint.spec.dtype is None:
        written["dtype"] = checkpoint.index.main_dtype
    if any(step.matrix is not None for step in steps):
        written["quantization_config"] = entries
    small_files = copied_files(checkpoint.folder)
    weight_map = index_json(shards)
    if weight_map is not None:
        small_files[INDEX_FILE] = weight_map
    small_files["config.json"] = (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()
    return PackPlan(
        checkpoint=checkpoint,
        adapter=adapter,
        dtype=dtype,
        steps=steps,
        files=FolderFiles(shards=shards, small_files=small_files),
        dropped=dropped,
    )


def write_packed(plan: PackPlan, folder: Path, *, advance: Advance = lambda num_bytes: None) -> None:
    """Write a planned folder. In memory it holds the largest matrix; config.json comes last. `advance` is told the
    bytes of weights written.

    An error or interrupt leaves nothing behind, of the folders above it that were made either.

    Raises:
        InvalidRequestError: the folder is not empty, or lies in the source.
        CheckpointError: the disk has no room, or cannot be written.
    """
    with disk_errors(folder, again="save again: what was written is removed"):
        check_apart(plan.checkpoint.folder, folder)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if not made and (found := sorted(path.name for path in folder.iterdir())):
            raise InvalidRequestError(f"{folder} is not empty: it holds {found[0]}", hint="name a new or empty folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_room(folder, plan.files.num_bytes)
            _write_shards(plan, folder, advance)
            for shard in plan.files.shards:
                move_file(folder / (shard.file_name + PARTIAL_SUFFIX), folder / shard.file_name)
            for name, content in plan.files.small_files.items():
                write_file(folder / name, content)
            sync_folder(folder)
        except BaseException:
            for name in plan.files.names:
                for path in (folder / name, folder / (name + PARTIAL_SUFFIX)):
                    with suppress(OSError):
                        path.unlink()
            for path in made:
                with suppress(OSError):  # something else was put there
                    path.rmdir()
            raise


def _write_shards(plan: PackPlan, folder: Path, advance: Advance) -> None:
    places: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack:
        for shard in plan.files.shards:
            path = folder / (shard.file_name + PARTIAL_SUFFIX)
            file = stack.enter_context(path.open("xb", buffering=0)).fileno()
            write_at(file, shard.header, 0)
            advance(len(shard.header))
            position = len(shard.header)
            for unit in shard.units:
                places[next(iter(unit.rows))] = (file, position)
                position += unit.num_bytes
        for unit, content in _contents(plan):
            file, position = places[next(iter(unit.rows))]
            write_at(file, content, position)
            advance(unit.num_bytes)
        for file in {file for file, _ in places.values()}:
            os.fsync(file)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write every byte from `position` of a file on; one call of the system writes 2 GiB at most."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def _contents(plan: PackPlan) -> Iterator[tuple[Unit, memoryview]]:
    """Every unit with its bytes, in the order of the steps, until the next is asked for."""
    source = open_source(plan.checkpoint, plan.adapter)
    staging = torch.empty(max(_staging_bytes(step, source, plan.dtype) for step in plan.steps), dtype=torch.uint8)
    for step in plan.steps:
        if step.matrix is None:
            yield from ((unit, read_unit(source, unit, staging)) for unit in step.units)
            continue
        tensors = [
            tensor
            for packed in _read_packed(source, step.matrix, staging.view(plan.dtype))
            for tensor in packed.tensors().values()
        ]
        for unit, tensor in zip(step.units, tensors, strict=True):
            yield unit, tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _staging_bytes(step: _Step, source: TensorSource, dtype: torch.dtype) -> int:
    """Bytes, in whole values of `dtype`, of what a step reads before it is written."""
    matrix = step.matrix
    if matrix is None:
        return max(-(-unit.num_bytes // dtype.itemsize) * dtype.itemsize for unit in step.units)
    if matrix.scheme is None or _in_blocks(source, matrix):
        return 0
    return sum(matrix.parts.values()) * matrix.in_features * dtype.itemsize


def _in_blocks(source: TensorSource, matrix: _Matrix) -> TypeGuard[BlockSource]:
    return isinstance(source, BlockSource) and next(iter(matrix.parts)) in _AS_LONG_AS_THE_VOCABULARY


def _read_packed(source: TensorSource, matrix: _Matrix, staging: Tensor) -> Sequence[Packed]:
    """A matrix in the very form in which a build would keep it."""
    parts, in_features, num_rows = matrix.parts, matrix.in_features, sum(matrix.parts.values())
    cpu = torch.device("cpu")
    if matrix.scheme is None:
        assert isinstance(source, PackedSource)
        stored = source.read_packed(parts, in_features, cpu)
        assert stored is not None
        return stored
    packed = empty_packed(matrix.scheme, num_rows, in_features, INT4_GROUP, cpu)
    if isinstance(packed, PackedInt8) and _in_blocks(source, matrix):
        (name,) = _weights(parts)
        quantize_blocks_into(packed, source.read_blocks(name, (num_rows, in_features)))
    else:
        weight = staging[: num_rows * in_features].view(num_rows, in_features)
        source.read_into(weight, _weights(parts))
        quantize_into(packed, weight)
    return [packed]


@final
class _Recorder:
    """Answers a build on the "meta" device, and keeps what it asked for as steps."""

    def __init__(
        self, checkpoint: Checkpoint, source: TensorSource, preset: QuantPreset, adapter: Adapter | None
    ) -> None:
        self._checkpoint = checkpoint
        self._source = source
        self._preset = preset
        self._adapted = frozenset() if adapter is None else frozenset(adapter.names)
        self._target = PtLayout(has_two_banks=checkpoint.spec.vision is not None)
        self.steps: list[_Step] = []

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        self._source.read_into(out, parts)
        units = plan_units(self._checkpoint.index, self._checkpoint.layout, parts, self._target)
        for unit in units:
            if not self._adapted.isdisjoint(unit.rows):
                # Merged, a tensor is rounded to what the model computes with, which may be wider than its file.
                unit = replace(unit, dtype=_STORED_NAMES[out.dtype])
            self.steps.append(_Step(units=(unit,)))

    def read_packed(self, parts: Mapping[str, int], in_features: int, device: torch.device) -> Sequence[Packed] | None:
        scheme: Scheme | None = None
        stored = None
        if isinstance(self._source, PackedSource):
            stored = self._source.read_packed(parts, in_features, device)
        if stored is None:
            scheme = matrix_scheme(self._preset, parts, in_features)
            if scheme is None:
                return None
            num_rows = sum(parts.values())
            self._source.read_into(torch.empty((num_rows, in_features), device=device), _weights(parts))
            stored = [empty_packed(scheme, num_rows, in_features, INT4_GROUP, device)]
        names = [packed_name(parts)] if len(stored) == 1 else list(parts)
        units = tuple(
            _unit(f"{name}.{leaf}", tensor)
            for name, packed in zip(names, stored, strict=True)
            for leaf, tensor in packed.tensors().items()
        )
        matrix = _Matrix(parts=dict(parts), in_features=in_features, scheme=scheme)
        self.steps.append(_Step(units=units, matrix=matrix))
        return stored


def _unit(name: str, tensor: Tensor) -> Unit:
    return Unit(rows={name: tensor.shape[0]}, dtype=_STORED_NAMES[tensor.dtype], row_shape=tuple(tensor.shape[1:]))


def _weights(parts: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}.weight": width for name, width in parts.items()}
