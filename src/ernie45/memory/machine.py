"""What this machine has, asked without torch: main memory, a GPU driver."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import psutil

# /proc/self/cgroup: hierarchy, controllers, path. /proc/self/mountinfo: root, mount point, file system.
_CGROUP_LINE = re.compile(r"^\d+:([^:\n]*):(/.*)$", re.MULTILINE)
_MOUNT_LINE = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .* - (cgroup2?) ", re.MULTILINE)
# Version 1 writes "no limit" as 2^63 rounded down to a page.
_NO_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Main memory in bytes: all of the machine's, and what this process can still take.

    `limited_by` says whether the machine or a memory cgroup sets `available_bytes`; `limit_bytes` is the limit of the
    cgroup with the least room, None where none has a limit.
    """

    total_bytes: int
    available_bytes: int
    limited_by: Literal["machine", "cgroup"]
    limit_bytes: int | None

    @property
    def most_bytes(self) -> int:
        """What could be had if nothing else were in use."""
        return self.total_bytes if self.limit_bytes is None else min(self.total_bytes, self.limit_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """Where a version of cgroups writes a group's figures, those of the groups below it included."""

    limits: tuple[str, ...]
    usage: str
    stat_prefix: str


_FILES = {
    # Above memory.high a process is not killed but slowed down until it seems to hang.
    "cgroup2": _Files(limits=("memory.max", "memory.high"), usage="memory.current", stat_prefix=""),
    "cgroup": _Files(limits=("memory.limit_in_bytes",), usage="memory.usage_in_bytes", stat_prefix="total_"),
}


def host_bytes(root: Path = Path("/")) -> HostMemory:
    """What can be taken without swapping or being killed: the least that the machine and each memory cgroup allow.

    Counted are the process's own cgroup and all above it that are mounted below `root`, versions 1 and 2. Page cache
    can be taken back, so it counts as available. A file that is missing or makes no sense sets no limit.
    """
    machine = psutil.virtual_memory()
    rooms = [room for files, folder in _memory_cgroups(root) if (room := _room(files, folder)) is not None]
    room_bytes, limit_bytes = min(rooms, default=(machine.available, None))
    return HostMemory(
        total_bytes=machine.total,
        available_bytes=min(machine.available, room_bytes),
        limited_by="cgroup" if room_bytes < machine.available else "machine",
        limit_bytes=limit_bytes,
    )


def has_cuda_driver(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA driver seems to be there (Linux, also inside Windows), so that it is worth asking torch."""
    signs = ("proc/driver/nvidia/version", "dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1")
    return any((root / sign).exists() for sign in signs)


def _memory_cgroups(root: Path) -> Iterator[tuple[_Files, Path]]:
    """This process's memory cgroups as folders, each with those above it up to the root of its mount."""
    own = {}
    for controllers, path in _CGROUP_LINE.findall(_text(root / "proc/self/cgroup")):
        if controllers == "":
            own["cgroup2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup"] = path
    for mounted, mount_point, version in _MOUNT_LINE.findall(_text(root / "proc/self/mountinfo")):
        if version in own:  # the mounts of other controllers have no figures on memory
            below = _path_below(mounted, own[version])
            for path in (below, *below.parents):
                yield _FILES[version], root / mount_point.lstrip("/") / path


def _path_below(mounted: str, own: str) -> PurePosixPath:
    """The way from the cgroup that a mount shows as its root to the process's own, empty where that is not to be seen.

    In a container the mount often shows just the container's cgroup, under a path of the host or of a namespace.
    """
    try:
        path = PurePosixPath(own).relative_to(mounted)
    except ValueError:
        return PurePosixPath()
    return PurePosixPath() if ".." in path.parts else path


def _room(files: _Files, folder: Path) -> tuple[int, int] | None:
    """What a cgroup still allows and its limit, in bytes; None without a limit."""
    limits = [limit for name in files.limits if (limit := _number(folder / name)) is not None and limit < _NO_LIMIT]
    usage = _number(folder / files.usage)
    if not limits or usage is None:
        return None
    stat = _text(folder / "memory.stat")
    cache = re.findall(rf"^{files.stat_prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)
    held = max(usage - sum(map(int, cache)), 0)
    return max(min(limits) - held, 0), min(limits)


def _number(path: Path) -> int | None:
    """The number in a file; None for "max" and for what is no number."""
    text = _text(path).strip()
    return int(text) if re.fullmatch(r"\d{1,20}", text, re.ASCII) else None


def _text(path: Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):  # ValueError: a path that cannot be one
        return ""
