from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from ernie45.memory.bandwidth import copy_rate

MIB = 2**20


def test_reading_is_measured_once_and_leaves_neither_threads_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_rate.cache_clear()
    threads, resident = threading.active_count(), psutil.Process().memory_info().rss
    rate = copy_rate()
    assert 1e8 < rate < 1e14
    assert threading.active_count() == threads
    assert psutil.Process().memory_info().rss - resident < 64 * MIB
    monkeypatch.setattr(np, "empty", None)
    assert copy_rate() == rate


def test_reading_takes_as_long_as_one_pass_of_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread takes 10 ms for its part, all of them at once: at most all of the buffer in 10 ms."""
    copy_rate.cache_clear()
    num_bytes = max(128, 16 * (os.cpu_count() or 1)) * MIB
    monkeypatch.setattr(np, "sum", lambda part: time.sleep(0.01))
    try:
        assert 4 * MIB / 0.01 < copy_rate() <= num_bytes / 0.01
    finally:
        copy_rate.cache_clear()


def test_torch_stays_out() -> None:
    program = (
        "import sys; from ernie45.memory.bandwidth import copy_rate; copy_rate(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
