"""How fast a machine reads its memory: what bounds the speed of decoding."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_READ_BYTES = 2**30
_NUM_READS = 6


def read_rate() -> float:
    """Bytes a second at which a thread for each core reads 1 GiB, in the best of some passes.

    They are products of float32 numbers with themselves: the fastest of numpy's passes over memory, and as fast as a
    loop of loads alone.
    """
    num_threads = os.cpu_count() or 1
    parts = np.array_split(np.ones(_READ_BYTES // 4, np.float32), num_threads)
    best_seconds = float("inf")
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        for _ in range(_NUM_READS):
            started = time.perf_counter()
            list(pool.map(np.dot, parts, parts))
            best_seconds = min(best_seconds, time.perf_counter() - started)
    return _READ_BYTES / best_seconds
