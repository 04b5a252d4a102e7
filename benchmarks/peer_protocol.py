"""The process of one side in `benchmarks.peers`: it loads once, then runs what stands on each line of its input.

Standard library only, for it runs in the Python of each side. A line in is a JSON list of requests, each `[token ids,
number of new tokens]`. A line out is `[seconds to the first token, seconds of the others]` for one request,
`[seconds]` for several together; the first line out describes the side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from benchmarks.workloads import Request


class TimedSide(Protocol):
    """One contender, loaded on the CPU with a thread for each core. It runs greedily and never stops early."""

    def describe(self) -> Mapping[str, object]:
        """Its version, and what else belongs beside its numbers."""
        ...

    def alone(self, request: Request) -> tuple[float, float]:
        """Seconds to the first new token, and of all after it."""
        ...

    def together(self, requests: Sequence[Request]) -> float:
        """Seconds for all of them, in the way that suits this side best."""
        ...


def serve(load: Callable[[], TimedSide]) -> None:
    """Load, describe, and run requests until the input ends."""
    # Libraries print to standard output too; from here on that is standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    started = time.perf_counter()
    side = load()
    load_seconds = round(time.perf_counter() - started, 2)
    print(json.dumps({"load_seconds": load_seconds, **side.describe()}), file=answers, flush=True)
    for line in sys.stdin:
        requests = [Request(token_ids=tuple(ids), num_new_tokens=count) for ids, count in json.loads(line)]
        seconds = side.alone(requests[0]) if len(requests) == 1 else (side.together(requests),)
        print(json.dumps(seconds), file=answers, flush=True)
