"""`ernie45 convert`: a -PT or packed folder from a checkpoint in any layout, written so that it can be cut off at any
point."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ernie45.checkpoint.passing_thread import on_passing_thread
from ernie45.checkpoint.progress import Advance, byte_progress
from ernie45.checkpoint.resolve import resolve
from ernie45.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    PARTIAL_SUFFIX,
    AppendedFile,
    Shard,
    UnitSource,
    append_shard,
    check_apart,
    check_room,
    destination_folder,
    disk_errors,
    move_file,
    sync_folder,
    write_file,
)
from ernie45.commands.conversion_plan import CHECKSUM_FILE, ConversionPlan, check_config, plan_conversion
from ernie45.commands.journal import JOURNAL_FILE, Journal, open_journal
from ernie45.errors import CorruptFileError, InvalidRequestError
from ernie45.presets import QuantPreset, find_preset
from ernie45.types.reports import IgnoredTensor

SYNC_BYTES = 256 << 20
"""Bytes between two marks: what a run that is cut off has to do again, at most, is this and one tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertReport:
    """What a conversion did. `files` are those in the destination, `num_bytes` their size.

    `resumed_bytes` were there from an earlier run; `was_finished`: all of it, and nothing was written. `dropped` are
    stored tensors that the destination does without.
    """

    source: str
    destination: str
    layout: str
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    dropped: tuple[IgnoredTensor, ...]
    warnings: tuple[str, ...]
    resumed_bytes: int
    was_finished: bool
    seconds: float

    def __str__(self) -> str:
        if self.was_finished:
            return f"{self.destination} is finished already: {len(self.files)} files, {self.num_bytes:,} bytes"
        lines = [
            f"{self.destination}: {self.num_tensors} tensors, {self.num_bytes:,} bytes in {len(self.files)} files, "
            f"from {self.source} (layout {self.layout!r}) in {self.seconds:.1f} s"
        ]
        if self.resumed_bytes:
            lines.append(f"went on after {self.resumed_bytes:,} bytes of an earlier run")
        lines += [f"left out {tensor.name}: {tensor.reason}" for tensor in self.dropped]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines.append(f"checksums: {CHECKSUM_FILE} (check with: sha256sum -c {CHECKSUM_FILE})")
        return "\n".join(lines)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    quantization: str | QuantPreset = "none",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> ConvertReport:
    """Write a checkpoint as a -PT folder, which transformers opens, or with a preset in ernie45's packed format.

    In memory it holds the largest matrix and a block. Cut off at any point and run again, it goes on, and the files are
    byte for byte those of an uninterrupted run; on a finished destination nothing is written.

    Args:
        source: a folder in any layout, or a name as `ErnieModel.from_pretrained` takes it.
        destination: a new or empty folder, or one that an earlier run left unfinished.
        quantization: "none" for a -PT folder, or a preset that can be stored: "int8", "int4" or a QuantPreset of these.
        max_shard_bytes: the most bytes of tensors in one weight file; what is larger and may not be split, a tensor or
            a packed expert, gets a file of its own.
        progress: show a bar, where there is a terminal or a notebook.

    Raises:
        InvalidRequestError: the destination is not empty, belongs to another conversion, or lies in the source.
        UnsupportedError: transformers has no place for a tensor, or the preset cannot be stored.
        CheckpointError: or one of its kinds: what loading would refuse, or a full disk.
    """
    started = time.perf_counter()
    if max_shard_bytes < 1:
        raise InvalidRequestError(f"max_shard_bytes is {max_shard_bytes}", hint="it must be a number of bytes above 0")
    preset = find_preset(quantization)
    if preset is None:
        raise InvalidRequestError(
            "a conversion needs to know the preset, and quantization='auto' depends on the machine",
            hint="name one: 'none', 'int8' or 'int4'",
        )
    folder = destination_folder(destination)
    source_folder = resolve(source, progress=progress, check=check_config)
    check_apart(source_folder, folder)
    plan = plan_conversion(source_folder, preset, max_shard_bytes=max_shard_bytes)
    files = plan.pack.files
    with disk_errors(folder, again="run the same command again: it goes on"):
        was_finished = _is_finished(folder, plan)
        resumed_bytes = 0
        if not was_finished:
            journal = _begin(folder, plan)
            resumed_bytes = journal.num_bytes
            _write(folder, plan, journal, progress)
        num_bytes = files.num_bytes + (folder / CHECKSUM_FILE).stat().st_size
    return ConvertReport(
        source=str(source_folder),
        destination=str(folder),
        layout=plan.pack.checkpoint.layout.name,
        files=(*files.names, CHECKSUM_FILE),
        num_tensors=files.num_tensors,
        num_bytes=num_bytes,
        dropped=plan.pack.dropped,
        warnings=plan.warnings,
        resumed_bytes=resumed_bytes,
        was_finished=was_finished,
        seconds=time.perf_counter() - started,
    )


def _is_finished(folder: Path, plan: ConversionPlan) -> bool:
    """Whether an earlier run has done all of it. Raises where it did something else, or files have changed since."""
    sums = folder / CHECKSUM_FILE
    if (folder / JOURNAL_FILE).exists() or not sums.is_file():
        return False
    if sums.read_text(encoding="utf-8", errors="replace").splitlines()[:1] != [_first_line(plan)]:
        raise InvalidRequestError(
            f"{folder} holds another checkpoint, or this one with another preset or in files of another size",
            hint="name a new folder",
        )
    files = plan.pack.files
    sizes = {shard.file_name: shard.num_bytes for shard in files.shards}
    sizes |= {name: len(content) for name, content in files.small_files.items()}
    for name, num_bytes in sizes.items():
        _check_size(folder / name, num_bytes)
    return True


def _begin(folder: Path, plan: ConversionPlan) -> Journal:
    """Open the journal of an earlier run or start one, once the folder holds nothing else and the disk has room."""
    folder.mkdir(parents=True, exist_ok=True)
    files = plan.pack.files
    journal = open_journal(folder, plan.digest)
    ours = {JOURNAL_FILE + PARTIAL_SUFFIX}
    if journal is not None:
        shards = files.shards
        whole = {shard.file_name for shard in shards if journal.mark(shard.file_name).num_bytes == shard.num_bytes}
        ours |= {JOURNAL_FILE, CHECKSUM_FILE, *files.small_files, *whole}
        ours |= {name + PARTIAL_SUFFIX for name in (*files.names, CHECKSUM_FILE)}
    sizes = {path.name: path.lstat().st_size for path in folder.iterdir()}
    foreign = sorted(sizes.keys() - ours)
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InvalidRequestError(
            f"{folder} holds files that are not of this conversion: {shown}", hint="name a new or empty folder"
        )
    # Bytes after a mark are there as well: what replaces them takes no more room.
    there = sum(size for name, size in sizes.items() if not name.startswith(JOURNAL_FILE))
    check_room(folder, files.num_bytes - there)
    if journal is None:
        journal = Journal(folder, plan.digest, {})
        journal.save()
    return journal


def _write(folder: Path, plan: ConversionPlan, journal: Journal, progress: bool) -> None:
    files = plan.pack.files
    missing_bytes = files.weight_bytes - journal.num_bytes
    with byte_progress(f"Converting {plan.pack.checkpoint.folder.name}", missing_bytes, show=progress) as advance:
        on_passing_thread(lambda advance: _write_shards(folder, plan, journal, advance), advance)
    for name, content in files.small_files.items():
        write_file(folder / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.small_files.items()}
    sums |= {shard.file_name: journal.mark(shard.file_name).sha256 for shard in files.shards}
    lines = [_first_line(plan), *(f"{sums[name]}  {name}" for name in sorted(sums))]
    write_file(folder / CHECKSUM_FILE, ("\n".join(lines) + "\n").encode())
    journal.remove()
    (folder / (JOURNAL_FILE + PARTIAL_SUFFIX)).unlink(missing_ok=True)
    sync_folder(folder)


def _write_shards(folder: Path, plan: ConversionPlan, journal: Journal, advance: Advance) -> None:
    reader = plan.pack.open_reader()
    for shard in plan.pack.files.shards:
        _write_shard(folder / shard.file_name, shard, journal, reader, advance)


def _write_shard(path: Path, shard: Shard, journal: Journal, source: UnitSource, advance: Advance) -> None:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    mark = journal.mark(path.name)
    if mark.num_bytes < shard.num_bytes:
        with AppendedFile(partial, mark) as file:
            for _ in append_shard(file, shard, source, advance):
                if file.num_bytes - mark.num_bytes >= SYNC_BYTES:
                    mark = file.sync()
                    journal.set_mark(path.name, mark)
            journal.set_mark(path.name, file.sync())
    if partial.exists():
        _check_size(partial, shard.num_bytes)
        move_file(partial, path)
    _check_size(path, shard.num_bytes)


def _check_size(path: Path, num_bytes: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != num_bytes:
        raise CorruptFileError(
            f"{path} was written with {num_bytes:,} bytes, and now "
            + ("is not there" if actual is None else f"has {actual:,}"),
            hint="something else changed the folder: delete it and convert again",
        )


def _first_line(plan: ConversionPlan) -> str:
    # sha256sum passes over lines that begin with '#'.
    return f"# ernie45 convert {plan.digest}"
