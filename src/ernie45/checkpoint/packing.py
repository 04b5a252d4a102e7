"""Writing a folder, in our own packed format or plainly, from a checkpoint in any layout, matrix by matrix.

The format: docs/packed-format.md. A plan made from headers fixes every byte range before anything is written, and the
same weights and preset give the same files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ernie45.checkpoint.adapter import AdaptedSource, Adapter
from ernie45.checkpoint.headers import INDEX_FILE
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.open import Checkpoint, open_source, open_survey
from ernie45.checkpoint.packed import packed_name
from ernie45.checkpoint.packed_config import matrix_scheme, packed_entries
from ernie45.checkpoint.progress import Advance
from ernie45.checkpoint.read import BLOCK_BYTES, TORCH_DTYPES, BlockSource, PackedSource, TensorSource, bytes_of
from ernie45.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    PARTIAL_SUFFIX,
    START,
    AppendedFile,
    FolderFiles,
    Unit,
    append_shard,
    check_apart,
    check_room,
    copied_files,
    disk_errors,
    index_json,
    move_file,
    plan_shards,
    plan_units,
    sync_folder,
    write_file,
)
from ernie45.errors import InvalidRequestError, UnsupportedError
from ernie45.presets import INT4_GROUP, QuantPreset, Scheme
from ernie45.quantization.packed import PackedInt8, empty_packed
from ernie45.quantization.panels import PANEL_ROWS, StoredMatrix, empty_panels, in_panels, pad_rows
from ernie45.quantization.quantize import quantize_into
from ernie45.types.reports import IgnoredTensor

Build = Callable[[TensorSource], object]
"""Builds a model from a source on torch's "meta" device, asking for every tensor it needs in order."""

# config.json: how another layout is told, and code that is not copied.
_LEFT_OUT = ("source", "paddleformers_version", "auto_map", "quantization_config")
_AS_LONG_AS_THE_VOCABULARY = ("model.embed_tokens", "lm_head")
_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.")
_STORED_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items() if name != "U16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """A matrix to write packed. `parts` maps its -PT modules to rows; `scheme` is None where it is packed already.

    Else it is read in `dtype` and rounded from there. `in_blocks`: it is as long as the vocabulary and stored row by
    row, so that it need not be read as a whole.
    """

    parts: Mapping[str, int]
    in_features: int
    scheme: Scheme | None
    dtype: torch.dtype
    in_blocks: bool

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.parts.values()), self.in_features

    @property
    def read_bytes(self) -> int:
        """Bytes of it as a whole in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Tensors that are made at once: those of a packed matrix, one unit each, or a unit that is stored plainly."""

    units: tuple[Unit, ...]
    matrix: Matrix | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """The files of a folder, and how their weights are made: `steps`, in the order of a build. `dropped` are stored
    tensors that the folder does without."""

    checkpoint: Checkpoint
    adapter: Adapter | None
    steps: tuple[Step, ...]
    files: FolderFiles
    dropped: tuple[IgnoredTensor, ...]

    def open_reader(self) -> UnitReader:
        """What makes the content of `files`."""
        return UnitReader(open_source(self.checkpoint, self.adapter), self.steps)


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
    recorder = _Recorder(checkpoint, source, preset, adapter, dtype)
    build(recorder)
    if isinstance(source, AdaptedSource):
        source.check_all_merged()
    dropped = checkpoint.account_for(survey.unread())
    steps = tuple(recorder.steps)
    shards = plan_shards(_groups(steps), max_shard_bytes)
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
            reader = plan.open_reader()
            for shard in plan.files.shards:
                with AppendedFile(folder / (shard.file_name + PARTIAL_SUFFIX), START) as file:
                    for _ in append_shard(file, shard, reader, advance):
                        pass
                    file.sync()
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


@final
class UnitReader:
    """Makes units, those of a packed matrix from the matrix that was read last. In memory it holds one matrix as it is
    read, or a block of one as long as the vocabulary, and a block of codes."""

    def __init__(self, source: TensorSource, steps: Sequence[Step]) -> None:
        self._source = source
        self._steps = {_name(unit): step for step in steps for unit in step.units}
        self._staging = torch.empty(max(map(_staging_bytes, steps)), dtype=torch.uint8)
        self._made: dict[str, Tensor] = {}

    def read(self, unit: Unit) -> Iterator[memoryview]:
        """The unit's bytes as they go into the file, in pieces, each until the next is asked for. Raises as
        `TensorSource.read_into` does."""
        name = _name(unit)
        step = self._steps[name]
        if step.matrix is None:
            yield self._read_plain(unit)
        elif step.matrix.scheme is not None and unit is step.units[0]:
            yield from self._quantised(step, step.matrix, step.matrix.scheme)
        else:
            if name not in self._made:
                self._make(step, step.matrix)
            yield bytes_of(self._made[name].contiguous())

    def _read_plain(self, unit: Unit) -> memoryview:
        raw = self._staging[: unit.num_bytes]
        values = raw.view(TORCH_DTYPES[unit.dtype])
        out = values.view(unit.shape[::-1]).T if unit.transposed else values.view(unit.shape)
        self._source.read_into(out, unit.rows)
        return bytes_of(raw)

    def _make(self, step: Step, matrix: Matrix) -> None:
        """Have the tensors of a matrix; without its codes where they are rounded."""
        if matrix.scheme is not None:
            for _ in self._quantised(step, matrix, matrix.scheme):
                pass
            return
        assert isinstance(self._source, PackedSource)
        stored = self._source.read_packed(matrix.parts, matrix.in_features, torch.device("cpu"))
        assert stored is not None
        tensors = [tensor for packed in stored for tensor in packed.tensors().values()]
        self._made = {_name(unit): tensor for unit, tensor in zip(step.units, tensors, strict=True)}

    def _quantised(self, step: Step, matrix: Matrix, scheme: Scheme) -> Iterator[memoryview]:
        """A matrix's codes, rounded as a build does it, some rows at a time in the same memory; its other tensors are
        kept."""
        room_rows = min(matrix.shape[0], max(PANEL_ROWS, BLOCK_BYTES // matrix.in_features // PANEL_ROWS * PANEL_ROWS))
        cpu = torch.device("cpu")
        codes = empty_packed(scheme, room_rows, matrix.in_features, INT4_GROUP, cpu).codes
        packed = empty_packed(scheme, *matrix.shape, INT4_GROUP, cpu, lambda shape, dtype: codes)
        first = 0
        for block in self._read_rows(matrix):
            for rows in block.split(room_rows):
                tensors = {leaf: tensor[first : first + len(rows)] for leaf, tensor in packed.tensors().items()}
                tensors["codes"] = codes[: len(rows)]
                piece = type(packed)(**tensors)
                quantize_into(piece, rows)
                first += len(rows)
                yield bytes_of(piece.codes if isinstance(piece, PackedInt8) else in_panels(piece).panels)
        scales = packed.scales if isinstance(packed, PackedInt8) else packed.row_scales
        assert scales is not None
        self._made = {_name(step.units[1]): scales if isinstance(packed, PackedInt8) else pad_rows(scales)}

    def _read_rows(self, matrix: Matrix) -> Iterator[Tensor]:
        weights = _weights(matrix.parts)
        if matrix.in_blocks:
            assert isinstance(self._source, BlockSource)
            yield from self._source.read_blocks(next(iter(weights)), matrix.shape)
        else:
            weight = self._staging[: matrix.read_bytes].view(matrix.dtype).view(matrix.shape)
            self._source.read_into(weight, weights)
            yield weight


def _staging_bytes(step: Step) -> int:
    """Bytes of what a step reads before it is written."""
    if step.matrix is None:
        return max(unit.num_bytes for unit in step.units)
    return 0 if step.matrix.scheme is None or step.matrix.in_blocks else step.matrix.read_bytes


def _groups(steps: Sequence[Step]) -> Iterator[list[Unit]]:
    """The units that lie in one file: those of a matrix, and those of a routed expert, which can be read at once."""
    for _, group in groupby(steps, key=_group_name):
        yield [unit for step in group for unit in step.units]


def _group_name(step: Step) -> str:
    name = _name(step.units[0])
    expert = _EXPERT.match(name)
    return name if expert is None else expert[0]


@final
class _Recorder:
    """Answers a build on the "meta" device, and keeps what it asked for as steps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: TensorSource,
        preset: QuantPreset,
        adapter: Adapter | None,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint = checkpoint
        self._source = source
        self._preset = preset
        self._adapted = frozenset() if adapter is None else frozenset(adapter.names)
        self._dtype = dtype
        self._target = PtLayout(has_two_banks=checkpoint.spec.vision is not None)
        self.steps: list[Step] = []

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        self._source.read_into(out, parts)
        units = plan_units(self._checkpoint.index, self._checkpoint.layout, parts, self._target)
        for unit in units:
            if not self._adapted.isdisjoint(unit.rows):
                # Merged, a tensor is rounded to what the model computes with, which may be wider than its file.
                unit = replace(unit, dtype=_STORED_NAMES[out.dtype])
            self.steps.append(Step(units=(unit,)))

    def read_packed(
        self, parts: Mapping[str, int], in_features: int, device: torch.device
    ) -> Sequence[StoredMatrix] | None:
        scheme: Scheme | None = None
        stored: Sequence[StoredMatrix] | None = None
        if isinstance(self._source, PackedSource):
            stored = self._source.read_packed(parts, in_features, device)
        if stored is None:
            scheme = matrix_scheme(self._preset, parts, in_features)
            if scheme is None:
                return None
            num_rows = sum(parts.values())
            self._source.read_into(torch.empty((num_rows, in_features), device=device), _weights(parts))
            if scheme == "int4":
                stored = [empty_panels(num_rows, in_features, device)]
            else:
                stored = [empty_packed(scheme, num_rows, in_features, INT4_GROUP, device)]
        names = [packed_name(parts)] if len(stored) == 1 else list(parts)
        units = tuple(
            _unit(f"{name}.{leaf}", tensor)
            for name, packed in zip(names, stored, strict=True)
            for leaf, tensor in packed.tensors().items()
        )
        self.steps.append(Step(units=units, matrix=self._matrix(parts, in_features, scheme)))
        return stored

    def _matrix(self, parts: Mapping[str, int], in_features: int, scheme: Scheme | None) -> Matrix:
        dtype, in_blocks, module = self._dtype, False, next(iter(parts))
        if scheme is not None and module in _AS_LONG_AS_THE_VOCABULARY:
            # As while loading, it is rounded from the dtype that it is stored in.
            piece = self._checkpoint.layout.locate(f"{module}.weight")
            dtype = TORCH_DTYPES[self._checkpoint.index.tensors[piece.key].dtype]
            in_blocks = not piece.transposed and piece.columns is None
        return Matrix(parts=dict(parts), in_features=in_features, scheme=scheme, dtype=dtype, in_blocks=in_blocks)


def _unit(name: str, tensor: Tensor) -> Unit:
    return Unit(rows={name: tensor.shape[0]}, dtype=_STORED_NAMES[tensor.dtype], row_shape=tuple(tensor.shape[1:]))


def _weights(parts: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}.weight": width for name, width in parts.items()}


def _name(unit: Unit) -> str:
    return next(iter(unit.rows))
