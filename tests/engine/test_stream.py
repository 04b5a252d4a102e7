"""The bounded queue between the engine and one reader."""

from __future__ import annotations

import pytest

from ernie45.engine.stream import TokenStream
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
