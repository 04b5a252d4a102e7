"""A process for each side, so that all stay loaded and only the one that is asked computes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, final

from typing_extensions import Self

from benchmarks.sides import load_side
from benchmarks.workloads import Request

Work: TypeAlias = Request | Sequence[Request]


@final
class Worker:
    """A side in a process of its own; leaving the `with` block ends it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, folder), daemon=True)
        self._process.start()
        # Only the worker may hold its end open: then its death ends our wait.
        theirs.close()

    def wait_until_loaded(self) -> None:
        """Wait for the checkpoint to be loaded. Raises EOFError if the process died; its traceback is on stderr."""
        self._connection.recv()

    def seconds(self, work: Work) -> float:
        """Seconds the side takes for one request, or for several together."""
        self._connection.send(work)
        seconds: float = self._connection.recv()
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.terminate()


def _serve(connection: Connection, name: str, folder: Path) -> None:
    side = load_side(name, folder)
    connection.send("loaded")
    while True:
        try:
            work: Work = connection.recv()
        except EOFError:
            return
        started = time.perf_counter()
        if isinstance(work, Request):
            side.generate(work)
        else:
            side.generate_many(work)
        connection.send(time.perf_counter() - started)
