"""Run by test_convert.py and test_convert_packed.py in a process of its own: `killed_convert.py SOURCE FOLDER PRESET
SHARD_BYTES` converts SOURCE in many forked children, most of which are killed on the way (SIGKILL), and prints as JSON
what came of it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ernie45.checkpoint import write
from ernie45.commands import convert as convert_module
from ernie45.commands.convert import convert

PRESET, SHARD_BYTES = sys.argv[3], int(sys.argv[4])
convert_module.SYNC_BYTES = SHARD_BYTES * 2 // 5


def run(source: str, folder: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Convert in a child; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        prepare()
        convert(source, folder, quantization=PRESET, max_shard_bytes=SHARD_BYTES, progress=False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, f"exit status {os.WEXITSTATUS(status)}"
    return 0


def kill_after_bytes(num_bytes: int) -> None:
    """Have this process killed after so many bytes, whatever file they go into."""
    whole = write.write_at
    left = num_bytes

    def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
        nonlocal left
        if len(data) > left:
            whole(descriptor, data[:left], position)
            os.kill(os.getpid(), signal.SIGKILL)
        left -= len(data)
        whole(descriptor, data, position)

    write.write_at = write_at


def kill_before_step(number: int) -> None:
    """Have this process killed before the n-th time it brings something to the disk, renames or deletes."""
    left = number

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*arguments: object) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            call(*arguments)

        return wrapper

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    source, folder = sys.argv[1], Path(sys.argv[2])
    os.fsync = lambda fd: None  # a killed process leaves its pages to the system; waiting for the disk is slow
    assert run(source, folder / "whole") == 0
    expected = content(folder / "whole")
    total = sum(map(len, expected.values()))
    points = sorted(random.Random(45).sample(range(total), 10))

    differing = []
    unfinished: list[list[str]] = []
    for point in points:
        target = folder / f"after {point} bytes"
        assert run(source, target, lambda point=point: kill_after_bytes(point)) == signal.SIGKILL  # type: ignore[misc]
        unfinished.append(sorted(content(target)))
        assert run(source, target) == 0
        differing += [str(target)] * (content(target) != expected)

    target = folder / "again and again"
    num_kills = 0
    while run(source, target, lambda: kill_after_bytes(total // 3)) == signal.SIGKILL:
        num_kills += 1
        assert num_kills < 100
    differing += [str(target)] * (content(target) != expected)

    num_steps = 0
    killed = True
    while killed:
        target = folder / f"before step {num_steps}"
        killed = run(source, target, lambda: kill_before_step(num_steps)) == signal.SIGKILL  # noqa: B023 (called at once)
        assert run(source, target) == 0
        differing += [str(target)] * (content(target) != expected)
        num_steps += 1
    report = {
        "files": sorted(expected),
        "points": points,
        "unfinished": unfinished,
        "num_kills": num_kills,
        "num_steps": num_steps,
        "differing": differing,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
