"""The seam between the facade and whatever generates tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from ernie45.types.requests import TokenRequest
from ernie45.types.results import TokenEvent


class Handle(Protocol):
    """The token events of one request, for one reader.

    The last event has a `finish_reason`; after it nothing follows.
    """

    def poll(self) -> TokenEvent | None:
        """The next event, or None if there is none yet. Raises what made the request fail."""
        ...

    def notify(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, from any thread, as soon as `poll` has something to give (at once if it has)."""
        ...

    def cancel(self) -> None:
        """Ask for an early end; what the request holds is freed within a step. Safe to repeat."""
        ...


class Runner(Protocol):
    """Turns requests into token events. `submit` may be called from any thread and returns at once.

    A request with `logit_positions` is to have the logits of each of them given to its `on_logits`, and after that one
    event, with a `finish_reason` and no token.
    """

    def submit(self, request: TokenRequest) -> Handle: ...

    def close(self) -> None:
        """Free everything. Requests under way fail with ModelClosedError. Safe to repeat."""
        ...


def wait_until_ready(handle: Handle) -> None:
    """Sleep until `handle.poll` has something to give."""
    ready = threading.Event()
    handle.notify(ready.set)
    ready.wait()
