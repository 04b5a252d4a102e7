"""Reading all stored tensors of an expert at once, past the system's page cache."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import final

import numpy as np

from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.large_pages import map_large_pages
from ernie45.checkpoint.range_reads import read_fully
from ernie45.errors import CheckpointError, CorruptFileError

BLOCK_BYTES = 4096
"""Direct reads begin and end at multiples of it, in files and in memory."""

_JOINED_GAP_BYTES = 64 << 10  # to read over it takes less time than another read
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Range:
    """Bytes `start` to `stop` of `file`, which lie in the buffer from `place` on."""

    file: Path
    start: int
    stop: int
    place: int

    @property
    def lead(self) -> int:
        """Bytes between the start of its first block and `start`."""
        return self.start % BLOCK_BYTES

    @property
    def end(self) -> int:
        """Where its last block ends in the buffer."""
        return -(-(self.place + self.stop - self.start) // BLOCK_BYTES) * BLOCK_BYTES


@final
class StagedReader:
    """Keeps the bytes of the tensors that were staged last, in memory that is used again for the next: in large pages,
    where a disk has fewer places to write to and is up to twice as fast (docs/decisions/0025-streamed-reads.md).

    Files are read past the page cache, where expert after expert would drive out what is needed more; on file systems
    that refuse that, their pages are dropped after reading. They are opened for each `stage`, so that one which is put
    back works again. To be used by one thread.
    """

    def __init__(self) -> None:
        self._own = self._buffer = memoryview(b"")
        self._staged: tuple[_Range, ...] = ()

    def stage(self, infos: Sequence[TensorInfo], room: memoryview | None = None) -> tuple[int, ...] | None:
        """Read these tensors, and drop the ones before; into `room`, which begins at a multiple of 4,096 bytes, where
        they lie in the files so that they fit in there. Returns where in the room each of them begins, None if they are
        not there.

        Raises:
            CheckpointError: a file is gone, or cannot be read.
            CorruptFileError: a file ends before a tensor does.
            OutOfMemoryError: there is no memory for them.
        """
        self._staged = ()  # should this fail
        ranges = _joined(infos)
        num_bytes = ranges[-1].end if ranges else 0
        fits = room is not None and num_bytes <= len(room)
        if room is not None and fits:
            self._buffer = room
        else:
            if num_bytes > len(self._own):
                self._own = memoryview(map_large_pages(num_bytes, "to read an expert into"))
            self._buffer = self._own
        for file, its_ranges in groupby(ranges, key=lambda stretch: stretch.file):
            self._read_file(file, tuple(its_ranges))
        self._staged = ranges
        return tuple(self._place(info.file, info.start, info.num_bytes) for info in infos) if fits else None

    def view(self, info: TensorInfo) -> memoryview | None:
        """The bytes of a tensor, without a copy, until the next `stage`; None if it is not staged."""
        return self._find(info.file, info.start, info.num_bytes)

    def read(self, path: Path, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes of a file from `start` on, out of what is staged if they are; returns how many
        there were, fewer at its end. Raises CheckpointError as `stage` does."""
        staged = self._find(path, start, len(target))
        if staged is not None:
            np.copyto(np.asarray(target), np.asarray(staged))  # without Python's lock, unlike an assignment
            return len(target)
        with _opened(path, os.O_RDONLY) as descriptor:
            return read_fully(descriptor, start, target)

    def _find(self, path: Path, start: int, num_bytes: int) -> memoryview | None:
        place = self._place(path, start, num_bytes)
        return None if place < 0 else self._buffer[place : place + num_bytes]

    def _place(self, path: Path, start: int, num_bytes: int) -> int:
        """Where in the buffer bytes of a file begin; -1 if they are not staged."""
        for stretch in self._staged:
            if stretch.start <= start and start + num_bytes <= stretch.stop and stretch.file == path:
                return stretch.place + start - stretch.start
        return -1

    def _read_file(self, file: Path, ranges: tuple[_Range, ...]) -> None:
        if sys.platform == "linux" and self._read_directly(file, ranges):
            return
        with _opened(file, os.O_RDONLY) as descriptor:
            for stretch in ranges:
                target = self._buffer[stretch.place :][: stretch.stop - stretch.start]
                _check_read(stretch, descriptor, read_fully(descriptor, stretch.start, target))
                if sys.platform == "linux":
                    os.posix_fadvise(descriptor, stretch.start, len(target), os.POSIX_FADV_DONTNEED)

    def _read_directly(self, file: Path, ranges: tuple[_Range, ...]) -> bool:
        """Whether this file system allows it."""
        try:
            with _opened(file, os.O_RDONLY | os.O_DIRECT) as descriptor:
                for stretch in ranges:
                    target = self._buffer[stretch.place - stretch.lead : stretch.end]
                    num_bytes = read_fully(descriptor, stretch.start - stretch.lead, target, block_bytes=BLOCK_BYTES)
                    _check_read(stretch, descriptor, num_bytes - stretch.lead)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NOT_DIRECT:
                return False
            raise
        return True


def _joined(infos: Sequence[TensorInfo]) -> tuple[_Range, ...]:
    """What to read for these tensors, each range in blocks of its own."""
    ranges: list[_Range] = []
    for info in sorted(infos, key=lambda info: (info.file, info.start)):
        stop = info.start + info.num_bytes
        last = ranges[-1] if ranges else None
        if last is not None and last.file == info.file and info.start - last.stop < _JOINED_GAP_BYTES:
            ranges[-1] = _Range(file=last.file, start=last.start, stop=max(last.stop, stop), place=last.place)
        else:
            first = 0 if last is None else last.end
            ranges.append(_Range(file=info.file, start=info.start, stop=stop, place=first + info.start % BLOCK_BYTES))
    return tuple(ranges)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor. Whatever the system refuses, now or while it is in use, is a CheckpointError."""
    try:
        descriptor = os.open(path, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}",
            hint="the model reads this file while it is in use: put it back, or see to its disk, and ask again",
        ) from error


def _check_read(stretch: _Range, descriptor: int, num_bytes: int) -> None:
    if num_bytes < stretch.stop - stretch.start:
        raise CorruptFileError(
            f"{stretch.file} is cut short: of its bytes {stretch.start} to {stretch.stop} there are "
            f"{max(num_bytes, 0)}, and {os.fstat(descriptor).st_size} in all",
            hint="the file changed while the model was in use: fetch it again",
        )
