from __future__ import annotations

import threading
import time

import pytest

from ernie45.checkpoint.passing_thread import on_passing_thread
from ernie45.checkpoint.progress import Advance


def ignore(num_bytes: int) -> None:
    pass


def test_work_runs_elsewhere_and_gives_its_result() -> None:
    assert on_passing_thread(lambda advance: threading.current_thread().name, ignore) == "ernie45-weights_0"


def test_an_interrupt_while_the_thread_starts_leaves_no_work_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.wait(0.5)  # the other thread is ahead
        raise KeyboardInterrupt

    def work(advance: Advance) -> None:
        begun.set()
        for _ in range(20):
            time.sleep(0.05)
            advance(1)
        ended.set()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_passing_thread(work, ignore)
    assert not begun.is_set() or ended.is_set()
