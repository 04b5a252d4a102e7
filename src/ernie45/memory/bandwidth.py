"""How fast this machine reads its memory. Apart from memory/machine.py because numpy takes a while to import."""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ernie45.memory.machine import host_bytes

_READ_BYTES = 128 * 2**20
_READ_BYTES_PER_CPU = 16 * 2**20
_MIN_READ_BYTES = 8 * 2**20
_BLOCK_BYTES = 32 * 2**20
_WRITE_SECONDS = 0.03
_READ_SECONDS = 0.03


@functools.cache
def copy_rate() -> float:
    """Bytes a second at which all CPUs of this process together read memory once through: an estimate.

    It is the median of the passes made in 0.03 s over 128 MiB, or 16 MiB a CPU where that is more, but at most a
    quarter of the memory available. Caches of that size make it too high, other programs too low. The first call takes
    about 0.1 s; later ones give the same number.
    """
    num_threads = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    asked_bytes = max(_READ_BYTES, _READ_BYTES_PER_CPU * num_threads)
    num_bytes = max(min(asked_bytes, host_bytes().available_bytes // 4), _MIN_READ_BYTES)
    buffer = np.empty(num_bytes // 8, dtype=np.int64)
    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="ernie45-measuring") as pool:
        written = _write(buffer, pool, num_threads)
        parts = np.array_split(written, num_threads)
        seconds: list[float] = []
        end = time.perf_counter() + _READ_SECONDS
        while (started := time.perf_counter()) < end:
            list(pool.map(np.sum, parts))
            seconds.append(time.perf_counter() - started)
    return written.nbytes / statistics.median(seconds)


def _write(buffer: NDArray[np.int64], pool: ThreadPoolExecutor, num_threads: int) -> NDArray[np.int64]:
    """32 MiB of a new buffer, and more until 0.03 s are over: pages never written would all be read from a single one.

    A virtual machine may have to get each page from its host first, which takes longer than all the reading.
    """
    num_written, block = 0, _BLOCK_BYTES // 8
    end = time.perf_counter() + _WRITE_SECONDS
    while num_written < len(buffer) and time.perf_counter() < end:
        parts = np.array_split(buffer[num_written : num_written + block], num_threads)
        list(pool.map(lambda part: part.fill(1), parts))
        num_written += block
    return buffer[:num_written]
