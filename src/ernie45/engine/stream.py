"""TokenStream: the bounded queue between the engine and the reader of one request."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from ernie45.errors import UnsupportedError
from ernie45.types.results import TokenEvent


def check_process(process_id: int) -> None:
    """Raises UnsupportedError in any other process: a forked child has no engine thread, nor, perhaps, free locks."""
    if os.getpid() != process_id:
        raise UnsupportedError(
            "a model does not survive fork(): its engine thread is in the parent process",
            hint="load the model in the child process, or start children with multiprocessing's 'spawn'",
        )


class TokenStream:
    """Events of one request, in order. The engine puts, one reader polls; either side may be any thread.

    The queue is bounded by courtesy: the engine puts only while `has_room`. `wake_producer` is called when room
    appears or the reader cancels. In a forked child `poll` and `notify` raise UnsupportedError, and `cancel` does
    nothing.
    """

    def __init__(self, *, capacity: int, wake_producer: Callable[[], None]) -> None:
        self._events: deque[TokenEvent] = deque()
        self._capacity = capacity
        self._wake_producer = wake_producer
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._on_event: list[Callable[[], None]] = []
        self._process_id = os.getpid()
        self.cancelled = False

    # the engine's side

    @property
    def has_room(self) -> bool:
        return len(self._events) < self._capacity

    def put(self, event: TokenEvent) -> None:
        self._deliver(lambda: self._events.append(event))

    def fail(self, failure: BaseException) -> None:
        """End the stream: the reader gets `failure` after the events already queued."""
        self._deliver(lambda: setattr(self, "_failure", failure))

    def _deliver(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            callbacks, self._on_event = self._on_event, []
        for callback in callbacks:
            callback()

    # the reader's side

    def poll(self) -> TokenEvent | None:
        """The next event, or None if there is none yet. Raises what made the request fail."""
        check_process(self._process_id)
        with self._lock:
            if not self._events:
                if self._failure is not None:
                    raise self._failure
                return None
            was_full = not self.has_room
            event = self._events.popleft()
        if was_full:
            self._wake_producer()
        return event

    def notify(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, from any thread, as soon as `poll` has something to give (at once if it has)."""
        check_process(self._process_id)
        with self._lock:
            ready = bool(self._events) or self._failure is not None
            if not ready:
                self._on_event.append(callback)
        if ready:
            callback()

    def cancel(self) -> None:
        """Ask for the end: the engine frees the slot within a step and puts a "cancelled" event. Safe to repeat."""
        self.cancelled = True
        if os.getpid() == self._process_id:
            self._wake_producer()
