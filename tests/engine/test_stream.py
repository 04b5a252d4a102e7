"""The bounded queue between the engine and one reader."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

from ernie45.engine.stream import TokenStream
from ernie45.errors import UnsupportedError
from ernie45.types.results import TokenEvent


def test_events_come_in_order_and_room_counts_them() -> None:
    woken: list[bool] = []
    stream = TokenStream(capacity=2, wake_producer=lambda: woken.append(True))
    assert stream.poll() is None
    stream.put(TokenEvent(token_id=1))
    assert stream.has_room
    stream.put(TokenEvent(token_id=2))
    assert not stream.has_room
    assert [stream.poll(), stream.poll()] == [TokenEvent(token_id=1), TokenEvent(token_id=2)]
    assert woken == [True], "only leaving a full queue makes room that the producer waits for"


def test_notify_calls_once_and_at_once_when_there_is_something() -> None:
    calls: list[str] = []
    stream = TokenStream(capacity=4, wake_producer=lambda: None)
    stream.notify(lambda: calls.append("later"))
    assert calls == []
    stream.put(TokenEvent(token_id=1))
    stream.put(TokenEvent(token_id=2))
    assert calls == ["later"]
    stream.notify(lambda: calls.append("at once"))
    assert calls == ["later", "at once"]


def test_a_failure_comes_after_the_events_before_it_and_notifies() -> None:
    calls: list[bool] = []
    stream = TokenStream(capacity=4, wake_producer=lambda: None)
    stream.put(TokenEvent(token_id=1))
    stream.fail(ZeroDivisionError("late"))
    assert stream.poll() == TokenEvent(token_id=1)
    stream.notify(lambda: calls.append(True))
    assert calls == [True]
    with pytest.raises(ZeroDivisionError, match="late"):
        stream.poll()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
def test_a_forked_child_is_told_so_instead_of_waiting_forever() -> None:
    engine = threading.Lock()

    def wake() -> None:
        with engine:
            pass

    stream = TokenStream(capacity=4, wake_producer=wake)
    with engine, stream._lock:  # as threads may hold them that the child does not have
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            stream.cancel()
            os._exit(sum(map(tells_of_the_fork, (stream.poll, lambda: stream.notify(print)))))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert stream.poll() is None


def tells_of_the_fork(read: Callable[[], object]) -> bool:
    try:
        read()
    except UnsupportedError as error:
        return "fork" in error.message
    return False
