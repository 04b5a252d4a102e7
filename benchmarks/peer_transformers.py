"""transformers as a side of `benchmarks.peers`:

python -m benchmarks.peer_transformers FOLDER --cache growing|static [--compile]

In bf16. Many requests run in groups of four, padded on the left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import transformers

from benchmarks.peer_protocol import serve
from benchmarks.sides import TransformersSide
from benchmarks.workloads import Request


@final
class TimedTransformersSide:
    def __init__(self, folder: Path, *, static_cache: bool, compiled: bool) -> None:
        self._side = TransformersSide(folder, static_cache=static_cache, compiled=compiled)

    def describe(self) -> dict[str, object]:
        return {"version": transformers.__version__}

    def alone(self, request: Request) -> tuple[float, float]:
        """The first token in a run of its own: `generate` gives nothing before the end."""
        first_seconds = self._seconds([replace(request, num_new_tokens=1)])
        if request.num_new_tokens == 1:
            return first_seconds, 0.0
        return first_seconds, self._seconds([request]) - first_seconds

    def together(self, requests: Sequence[Request]) -> float:
        return self._seconds(requests)

    def _seconds(self, requests: Sequence[Request]) -> float:
        started = time.perf_counter()
        self._side.generate_many(requests)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint in the -PT layout")
    parser.add_argument("--cache", choices=["growing", "static"], default="growing")
    parser.add_argument("--compile", action="store_true", help="compile the forward; takes a static cache")
    options = parser.parse_args()
    static_cache = options.cache == "static"
    serve(lambda: TimedTransformersSide(options.folder, static_cache=static_cache, compiled=options.compile))


if __name__ == "__main__":
    main()
