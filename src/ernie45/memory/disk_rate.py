"""How fast experts are read from the disk that a checkpoint is on. Apart from the plan because numpy takes a while to
import."""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ernie45.checkpoint.headers import TensorInfo, read_headers
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.memory.streaming import NOMINAL_DISK_RATE
from ernie45.memory.workspace import NUM_EXPERT_READERS

_READ_SECONDS = 0.3
_PIECE_BYTES = 16 * 2**20  # of an expert that is larger, so that a slow disk keeps nobody waiting
_EXPERT = re.compile(r".*\.mlp\.experts\.\d+(?=\.)")


@functools.cache
def disk_rate(folder: Path) -> float:
    """Bytes a second at which the threads that read experts together read those of a checkpoint's folder, past the
    page cache: an estimate from 0.3 s, in which experts are picked at random. `NOMINAL_DISK_RATE` where it has none.

    Later calls give the same number. Raises CheckpointError for files that cannot be read.
    """
    experts: dict[str, list[TensorInfo]] = {}
    for name, info in read_headers(folder).tensors.items():
        if expert := _EXPERT.match(name):
            experts.setdefault(expert[0], []).append(info)
    if not experts:
        return NOMINAL_DISK_RATE
    started = time.perf_counter()
    pieces = list(map(_piece, experts.values()))
    with ThreadPoolExecutor(NUM_EXPERT_READERS, thread_name_prefix="ernie45-measuring") as pool:
        seeds = range(NUM_EXPERT_READERS)
        num_bytes = sum(pool.map(lambda seed: _read(pieces, seed, started + _READ_SECONDS), seeds))
    return num_bytes / (time.perf_counter() - started)


def _piece(expert: Sequence[TensorInfo]) -> Sequence[TensorInfo]:
    """An expert's tensors, or the beginning of its largest."""
    if sum(info.num_bytes for info in expert) <= _PIECE_BYTES:
        return expert
    largest = max(expert, key=lambda info: info.num_bytes)
    return [replace(largest, num_bytes=min(largest.num_bytes, _PIECE_BYTES))]


def _read(pieces: Sequence[Sequence[TensorInfo]], seed: int, end: float) -> int:
    """Read pieces until this time, at least one; returns their bytes."""
    reader, order = StagedReader(), random.Random(seed)
    num_bytes = 0
    while not num_bytes or time.perf_counter() < end:
        piece = order.choice(pieces)
        reader.stage(piece)
        num_bytes += sum(info.num_bytes for info in piece)
    return num_bytes
