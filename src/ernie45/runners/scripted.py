"""A runner that replays given replies: for tests of code that uses a model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from ernie45.errors import InvalidRequestError, ModelClosedError, UnsupportedError
from ernie45.runners.base import Handle
from ernie45.types.requests import ThinkingLimit, TokenRequest
from ernie45.types.results import FinishReason, TokenEvent


class ScriptedRunner:
    """Answers the n-th request with the n-th reply (token ids), cut at `max_new_tokens`; `requests` has them all.

    Of a reply whose reasoning is longer than `thinking_limit` allows, the rest of the reasoning is left out.
    """

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self._replies = deque(tuple(reply) for reply in replies)
        self._lock = threading.Lock()
        self._closed = False
        self.requests: list[TokenRequest] = []

    def submit(self, request: TokenRequest) -> Handle:
        if request.logit_positions is not None:
            raise UnsupportedError("a scripted model has no logits", hint="use ernie45/tiny-dense to test scoring")
        with self._lock:
            if self._closed:
                raise _closed_error()
            self.requests.append(request)
            if not self._replies:
                raise InvalidRequestError(
                    f"the script has no reply for request {len(self.requests)}",
                    hint="give scripted_model one more reply",
                )
            reply = self._replies.popleft()
        if request.thinking_limit is not None:
            reply = _with_limited_thinking(reply, request.thinking_limit)
        return _ScriptedHandle(self, reply, request)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        with self._lock:
            self._closed = True


class _ScriptedHandle:
    def __init__(self, runner: ScriptedRunner, reply: tuple[int, ...], request: TokenRequest) -> None:
        self._runner = runner
        self._token_ids = deque(reply[: request.max_new_tokens])
        self._finish_reason: FinishReason = "length" if len(reply) > request.max_new_tokens else "stop"
        self._cancelled = False

    def poll(self) -> TokenEvent | None:
        if self._runner.closed:
            raise _closed_error()
        if self._cancelled:
            return TokenEvent(finish_reason="cancelled")
        if self._token_ids:
            return TokenEvent(token_id=self._token_ids.popleft())
        return TokenEvent(finish_reason=self._finish_reason)

    def notify(self, callback: Callable[[], None]) -> None:
        callback()

    def cancel(self) -> None:
        self._cancelled = True


def _with_limited_thinking(reply: tuple[int, ...], limit: ThinkingLimit) -> tuple[int, ...]:
    end = reply.index(limit.end_token_id) if limit.end_token_id in reply else len(reply)
    if end < limit.max_tokens:
        return reply
    return (*reply[: limit.max_tokens], *limit.closing_ids, *reply[end + 1 :])


def _closed_error() -> ModelClosedError:
    return ModelClosedError("the model was closed", hint="make a new scripted model")
