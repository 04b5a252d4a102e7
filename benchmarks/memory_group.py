"""A memory cgroup for a process, so that it runs as on a machine with less memory. Linux, as root."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_END_SECONDS = 5.0  # in which the system notices that a group's last process has ended


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryGroup:
    """A cgroup's folder; None for no cgroup, in which commands run as they are."""

    folder: Path | None

    def command(self, command: Sequence[str]) -> tuple[str, ...]:
        """The same command, started in the group."""
        if self.folder is None:
            return tuple(command)
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A cgroup of its own, version 1 or 2, removed at the end; none where this user or system cannot make one.

    Page cache counts. Without swap a process that needs more than the limit is killed.
    """
    try:
        folder = _make(limit_bytes)
    except OSError:
        yield MemoryGroup(folder=None)
        return
    try:
        yield MemoryGroup(folder=folder)
    finally:
        end = time.monotonic() + _END_SECONDS
        while folder.exists() and time.monotonic() < end:
            with suppress(OSError):
                folder.rmdir()
            time.sleep(0.1)


def forget(folder_or_file: Path) -> None:
    """Have the system drop what it caches of these files, which would not count in a new group."""
    files = (
        [folder_or_file] if folder_or_file.is_file() else [each for each in folder_or_file.iterdir() if each.is_file()]
    )
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _make(limit_bytes: int) -> Path:
    is_v1 = _V1.is_dir()
    folder = Path(tempfile.mkdtemp(prefix="ernie45-", dir=_V1 if is_v1 else _V2))
    try:
        (folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(limit_bytes))
        swap = folder / ("memory.memsw.limit_in_bytes" if is_v1 else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes if is_v1 else 0))
    except OSError:
        folder.rmdir()
        raise
    return folder
