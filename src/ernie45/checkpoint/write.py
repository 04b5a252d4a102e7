"""Writing checkpoints: a plan made from headers alone, and files that survive being cut off.

The plan fixes every byte range before anything is written, and the same tensors give the same plan, however the source
lays them out and splits them into files. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

from ernie45.checkpoint.headers import DTYPE_BYTES, SINGLE_FILE, CheckpointIndex
from ernie45.checkpoint.layouts import Layout, PtLayout
from ernie45.checkpoint.progress import Advance
from ernie45.errors import CheckpointError, CorruptFileError, InvalidRequestError

DEFAULT_SHARD_BYTES = 5 * 10**9
PARTIAL_SUFFIX = ".partial"
_READ_BLOCK_BYTES = 16 << 20
_ALIGNMENT = 64  # a line of a CPU's cache, and what its widest loads like
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "Roboto-Regular.ttf",
    "LICENSE*",
)
_FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("up_gate_proj", ("gate_proj", "up_proj")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Tensors that are read at once and written one after another: the parts of a projection that Paddle's layouts
    fuse, or a single tensor.

    `rows` maps each -PT name to its first axis; `dtype` (safetensors' name) and `row_shape`, the other axes, are the
    same for all. `transposed`: the file to write has the axes of its one tensor the other way round.
    """

    rows: Mapping[str, int]
    dtype: str
    row_shape: tuple[int, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """All tensors stacked."""
        return (sum(self.rows.values()), *self.row_shape)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file to write: `header` (with its length before it), then the units one after another."""

    file_name: str
    header: bytes
    units: tuple[Unit, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return len(self.header) + self.tensor_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderFiles:
    """The files of a folder to write: shards of weights, and small files by name."""

    shards: tuple[Shard, ...]
    small_files: Mapping[str, bytes]

    @property
    def names(self) -> tuple[str, ...]:
        return (*(shard.file_name for shard in self.shards), *self.small_files)

    @property
    def num_tensors(self) -> int:
        return sum(len(unit.rows) for shard in self.shards for unit in shard.units)

    @property
    def weight_bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return self.weight_bytes + sum(map(len, self.small_files.values()))


def plan_units(index: CheckpointIndex, layout: Layout, names: Iterable[str], target: PtLayout) -> tuple[Unit, ...]:
    """Group the tensors of these -PT names into units, in the order of the model; `target` is the layout to write.

    Raises TensorError where a stored tensor does not have the shape that its parts need.
    """
    groups: dict[tuple[str, str, tuple[int, ...], bool], dict[str, int]] = {}
    for name in sorted(names, key=_place):
        dtype, shape = _stored_as(index, layout, name)
        group = (_place(name)[0], dtype, shape[1:], target.locate(name).transposed)
        groups.setdefault(group, {})[name] = shape[0]
    return tuple(
        Unit(rows=rows, dtype=dtype, row_shape=row_shape, transposed=transposed)
        for (_, dtype, row_shape, transposed), rows in groups.items()
    )


def plan_shards(groups: Iterable[Sequence[Unit]], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Fill files of at most `max_shard_bytes` of tensors, in order. A group is never split: a larger one gets a file of
    its own."""
    fills: list[list[Unit]] = [[]]
    filled = 0
    for group in groups:
        num_bytes = sum(unit.num_bytes for unit in group)
        if fills[-1] and filled + num_bytes > max_shard_bytes:
            fills.append([])
            filled = 0
        fills[-1] += group
        filled += num_bytes
    if len(fills) == 1:
        return (_shard(SINGLE_FILE, fills[0]),)
    return tuple(
        _shard(f"model-{number:05}-of-{len(fills):05}.safetensors", fill) for number, fill in enumerate(fills, start=1)
    )


def index_json(shards: Sequence[Shard]) -> bytes | None:
    """The content of model.safetensors.index.json; None where a single file needs none."""
    if len(shards) == 1:
        return None
    weight_map = {name: shard.file_name for shard in shards for unit in shard.units for name in unit.rows}
    total = sum(shard.tensor_bytes for shard in shards)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


class UnitSource(Protocol):
    """Where the bytes of units come from."""

    def read(self, unit: Unit) -> Iterable[memoryview]:
        """The unit's bytes as they go into the file, in pieces, each until the next is asked for."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The first `num_bytes` of a file are on the disk and have this checksum."""

    num_bytes: int
    sha256: str


START = Mark(num_bytes=0, sha256=hashlib.sha256().hexdigest())


@final
class AppendedFile:
    """A file written from front to back, that a later run can go on with where a mark was set. A context manager."""

    def __init__(self, path: Path, mark: Mark) -> None:
        """Go on after the bytes that `mark` vouches for; what follows them is cut off.

        Raises CorruptFileError when they are not there, or others.
        """
        self._sha256 = hashlib.sha256()
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            left = mark.num_bytes
            while left and (block := self._file.read(min(left, _READ_BLOCK_BYTES))):
                self._sha256.update(block)
                left -= len(block)
            if self._sha256.hexdigest() != mark.sha256:
                raise CorruptFileError(
                    f"the first {mark.num_bytes} bytes of {path} are not those that were written",
                    hint="delete the unfinished folder and start again",
                )
            self._file.truncate(mark.num_bytes)
        except BaseException:
            self._file.close()
            raise
        self.num_bytes = mark.num_bytes

    def append(self, data: bytes | memoryview) -> None:
        write_at(self._file.fileno(), data, self.num_bytes)
        self._sha256.update(data)
        self.num_bytes += len(data)

    def sync(self) -> Mark:
        """Bring everything to the disk, and say what is there."""
        os.fsync(self._file.fileno())
        return Mark(num_bytes=self.num_bytes, sha256=self._sha256.hexdigest())

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def append_shard(file: AppendedFile, shard: Shard, source: UnitSource, advance: Advance) -> Iterator[int]:
    """Append what `file` lacks of the shard, unit by unit; yields the bytes appended, so that the caller can set marks.

    The file ends with a whole unit, or is empty.
    """
    if file.num_bytes == 0:
        file.append(shard.header)
        advance(len(shard.header))
        yield len(shard.header)
    position = len(shard.header)
    for unit in shard.units:
        if position >= file.num_bytes:
            for piece in source.read(unit):
                file.append(piece)
                advance(len(piece))
            yield unit.num_bytes
        position += unit.num_bytes


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, or replace it: whole or not at all, whatever happens in between."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with AppendedFile(partial, START) as file:
        file.append(content)
        file.sync()
    move_file(partial, path)


def move_file(source: Path, target: Path) -> None:
    """Rename within a folder, and bring the folder to the disk."""
    os.replace(source, target)
    sync_folder(target.parent)


def destination_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder to write to that a caller named, with its `~` expanded. Raises InvalidRequestError where none is."""
    name = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else folder
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise InvalidRequestError(f"{folder!r} names no folder", hint="give the path of a new or empty folder")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(
            f"{name!r} begins with the home folder of a user who is not known here", hint="write the whole path"
        ) from error


def check_apart(source: Path, destination: Path) -> None:
    """Raises InvalidRequestError where `destination` is no folder to write to, or lies in `source`, and CheckpointError
    where it cannot be looked at."""
    with disk_errors(destination, again="try again"):
        is_file = destination.exists() and not destination.is_dir()
    if is_file:
        raise InvalidRequestError(f"{destination} is a file", hint="name a new folder to write to")
    inner, outer = destination.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise InvalidRequestError(
            f"the destination {destination} lies in the source {source}", hint="name a folder outside of it"
        )


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises CheckpointError where the disk of a folder that exists has less than this free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{folder} needs {needed_bytes:,} bytes, but its disk has {free_bytes:,} free",
            hint=f"free {needed_bytes - free_bytes:,} bytes, or write to another disk",
        )


@contextmanager
def disk_errors(folder: Path, *, again: str) -> Iterator[None]:
    """Turn errors of the system while `folder` is written into CheckpointError; `again` ends the hint."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"the disk is full: {folder} could not be finished ({error})", hint=f"free some space and {again}"
            ) from error
        raise CheckpointError(
            f"{folder} could not be written: {error}", hint=f"check its name and rights, then {again}"
        ) from error


def copied_files(folder: Path) -> dict[str, bytes]:
    """What a written folder takes over from its source as it is: tokenizer, template, processor and the like."""
    found = (path for pattern in _COPIED for path in sorted(folder.glob(pattern)) if path.is_file())
    return {path.name: path.read_bytes() for path in found}


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write every byte from `position` of a file on; one call of the system writes 2 GiB at most."""
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def _stored_as(index: CheckpointIndex, layout: Layout, name: str) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of one -PT tensor; raw bfloat16 bits (U16) become BF16."""
    piece = layout.locate(name)
    info = index.tensors[piece.key]
    shape = info.shape
    if piece.columns is not None:
        shape = (*shape[:-1], sum(column.stop - column.start for column in piece.columns))
    if piece.transposed:
        shape = shape[::-1]
    return "BF16" if info.dtype == "U16" else info.dtype, shape


def _place(name: str) -> tuple[str, int]:
    """A key that sorts tensors by the model's order: numbers by value, parts of a fused projection side by side."""
    place, part = name, 0
    for fused, leaves in _FUSED:
        for number, leaf in enumerate(leaves):
            if f".{leaf}." in name:
                place, part = name.replace(f".{leaf}.", f".{fused}."), number
    return re.sub(r"\d+", lambda match: match[0].zfill(9), place), part


def _shard(file_name: str, units: Sequence[Unit]) -> Shard:
    ordered = sorted(units, key=_alignment_order)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for unit in ordered:
        row_bytes = math.prod(unit.row_shape) * DTYPE_BYTES[unit.dtype]
        for name, num_rows in unit.rows.items():
            end = begin + num_rows * row_bytes
            shape = [num_rows, *unit.row_shape][:: -1 if unit.transposed else 1]
            entries[name] = {"dtype": unit.dtype, "shape": shape, "data_offsets": [begin, end]}
            begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return Shard(file_name=file_name, header=len(text).to_bytes(8, "little") + text, units=tuple(ordered))


def _alignment_order(unit: Unit) -> int:
    """Units of tensors of whole lines come first, then those of whole 4 bytes, then the others, so that every tensor
    starts at a multiple of its item size. What belongs together and is of whole 4 bytes lies in two places at most."""
    item_bytes = DTYPE_BYTES[unit.dtype]
    row_bytes = math.prod(unit.row_shape) * item_bytes
    divisor = math.gcd(*(num_rows * row_bytes for num_rows in unit.rows.values()))
    return -next(size for size in (_ALIGNMENT, max(4, item_bytes), 2, 1) if divisor % size == 0)
