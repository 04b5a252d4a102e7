from __future__ import annotations

import threading

import pytest

from ernie45.errors import InvalidRequestError, ModelClosedError, UnsupportedError
from ernie45.runners.base import Handle, Runner
from ernie45.runners.scripted import ScriptedRunner
from ernie45.types.requests import ThinkingLimit, TokenRequest
from ernie45.types.results import TokenEvent


def request(*ids: int, max_new_tokens: int = 10) -> TokenRequest:
    return TokenRequest(token_ids=ids, max_new_tokens=max_new_tokens)


def read(handle: Handle) -> tuple[list[int], str]:
    ids: list[int] = []
    while True:
        event = handle.poll()
        assert event is not None
        if event.token_id is not None:
            ids.append(event.token_id)
        if event.finish_reason is not None:
            return ids, event.finish_reason


def test_the_nth_request_gets_the_nth_reply_and_is_recorded() -> None:
    runner: Runner = ScriptedRunner([[5, 6], [7]])
    first, second = runner.submit(request(1, 2)), runner.submit(request(3))
    assert read(second) == ([7], "stop")
    assert read(first) == ([5, 6], "stop")
    assert isinstance(runner, ScriptedRunner)
    assert [asked.token_ids for asked in runner.requests] == [(1, 2), (3,)]


def test_a_reply_is_cut_at_max_new_tokens() -> None:
    runner = ScriptedRunner([[5, 6, 7], [5, 6, 7]])
    assert read(runner.submit(request(1, max_new_tokens=2))) == ([5, 6], "length")
    assert read(runner.submit(request(1, max_new_tokens=3))) == ([5, 6, 7], "stop")


@pytest.mark.parametrize(
    ("max_tokens", "token_ids"),
    [(0, [3, 9, 3, 7, 8]), (1, [5, 3, 9, 3, 7, 8]), (2, [5, 6, 3, 9, 3, 7, 8]), (3, [5, 6, 9, 7, 8])],
)
def test_reasoning_is_cut_at_its_limit(max_tokens: int, token_ids: list[int]) -> None:
    limit = ThinkingLimit(max_tokens=max_tokens, end_token_id=9, closing_ids=(3, 9, 3))
    asked = TokenRequest(token_ids=(1,), max_new_tokens=10, thinking_limit=limit)
    assert read(ScriptedRunner([[5, 6, 9, 7, 8]]).submit(asked)) == (token_ids, "stop")
    assert read(ScriptedRunner([[5, 6]]).submit(asked))[0] == ([5, 6] if max_tokens > 2 else token_ids[:-2])


def test_cancelling_ends_a_reply() -> None:
    handle = ScriptedRunner([[5, 6]]).submit(request(1))
    assert handle.poll() == TokenEvent(token_id=5)
    handle.cancel()
    handle.cancel()
    assert handle.poll() == TokenEvent(finish_reason="cancelled")


def test_there_is_always_something_to_read() -> None:
    ready = threading.Event()
    ScriptedRunner([[5]]).submit(request(1)).notify(ready.set)
    assert ready.is_set()


def test_more_requests_than_replies() -> None:
    runner = ScriptedRunner([[5]])
    runner.submit(request(1))
    with pytest.raises(InvalidRequestError, match="no reply for request 2") as caught:
        runner.submit(request(1))
    assert "one more" in caught.value.hint


def test_scoring_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no logits"):
        ScriptedRunner([[5]]).submit(TokenRequest(token_ids=(1,), logit_positions=(0,)))


def test_close_ends_what_runs_and_refuses_what_comes() -> None:
    runner = ScriptedRunner([[5, 6], [7]])
    handle = runner.submit(request(1))
    assert handle.poll() is not None
    runner.close()
    runner.close()
    with pytest.raises(ModelClosedError, match="closed"):
        handle.poll()
    with pytest.raises(ModelClosedError, match="closed"):
        runner.submit(request(1))
