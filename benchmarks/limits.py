"""How near ernie45 comes to what a machine allows: where a token's time goes, and how it grows.

python -m benchmarks.limits MODEL --quantization int4 [--what reads overhead contexts rows] [--contexts 512 ... 32768]
                            [--rows 1 2 4 8 16] [--repetitions 5] [--json FILE]

`reads`: weights read a second while decoding, over the rate at which all cores together read memory. `overhead`: time
of a step outside the backend, and outside the native kernels. `contexts` and `rows`: time of a step by the tokens
before it and by the requests it serves, each with a line fitted to it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import ParamSpec

from benchmarks.ours import weight_bytes_a_token
from benchmarks.reads import read_rate
from benchmarks.report import describe_machine
from benchmarks.workloads import NEW_TOKENS, draw_workload
from ernie45 import ErnieModel
from ernie45.backends.text import TextBackend
from ernie45.kernels.native import Kernels

WORK = ("reads", "overhead", "contexts", "rows")
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (1, 2, 4, 8, 16)
PROMPT_TOKENS = 512

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one decoding step; of these in the backend, and of those in native kernels."""

    whole: float
    backend: float
    native: float


class Clock:
    """Reads three clocks at once: the time, and how much of it steps of the backend and native calls have taken so far.

    From when it is made, all of them in this process are counted.
    """

    def __init__(self) -> None:
        self._taken = {"backend": 0.0, "native": 0.0}
        TextBackend.forward = self._timed("backend", TextBackend.forward)  # type: ignore[method-assign]
        Kernels._call = self._timed("native", Kernels._call)  # type: ignore[method-assign]

    def read(self) -> tuple[float, float, float]:
        return time.perf_counter(), self._taken["backend"], self._taken["native"]

    def _timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*arguments: P.args, **options: P.kwargs) -> T:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._taken[name] += time.perf_counter() - started

        return timed


def step_time(model: ErnieModel, clock: Clock, prompts: Sequence[Sequence[int]]) -> StepTime:
    """A step that serves all `prompts`: the mean from when the last has its first token until the first ends."""
    # Prompts are run one a turn, while those before them decode.
    num_new_tokens = NEW_TOKENS + 2 * len(prompts)

    async def follow(prompt: Sequence[int]) -> list[tuple[float, float, float]]:
        chunks = model.astream_generate(prompt, max_new_tokens=num_new_tokens, temperature=0, ignore_eos=True)
        return [clock.read() async for chunk in chunks for _ in chunk.token_ids]

    async def follow_all() -> list[list[tuple[float, float, float]]]:
        return list(await asyncio.gather(*map(follow, prompts)))

    readings = asyncio.run(follow_all())
    last = max(readings, key=lambda each: each[0])
    end = min(each[-1] for each in readings)
    shared = [reading for reading in last if reading <= end]
    num_steps = len(shared) - 1
    whole, backend, native = ((b - a) / num_steps for a, b in zip(shared[0], shared[-1], strict=True))
    return StepTime(whole=whole, backend=backend, native=native)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """`start` + `slope` x, fitted to seconds by least squares; `most_off` is the largest error relative to them."""

    start: float
    slope: float
    most_off: float

    @staticmethod
    def through(sizes: Sequence[int], seconds: Sequence[float]) -> Line:
        slope, start = statistics.linear_regression(sizes, seconds)
        off = max(abs(start + slope * size - each) / each for size, each in zip(sizes, seconds, strict=True))
        return Line(start=start, slope=slope, most_off=off)


class Limits:
    """What is measured of one model. Each method loads it for what it needs, prints, and gives the numbers."""

    def __init__(self, name: str, quantization: str, num_repetitions: int) -> None:
        self._name, self._quantization, self._num_repetitions = name, quantization, num_repetitions
        self._clock = Clock()
        self._numbers = itertools.count()

    def reads(self) -> dict[str, Any]:
        with self._load(PROMPT_TOKENS, 1) as model:
            weight_bytes = weight_bytes_a_token(model)
            rates, shares = [], []
            for seconds in self._steps(model, PROMPT_TOKENS, 1):
                rates.append(read_rate())
                shares.append(weight_bytes / seconds.whole / rates[-1])
        share = statistics.median(shares)
        print(
            f"reads: {weight_bytes / 1e6:,.0f} MB of weights a token, at {share:.0%} ({min(shares):.0%} to "
            f"{max(shares):.0%}) of the {statistics.median(rates) / 1e9:.1f} GB/s at which memory is read"
        )
        return {"weight_bytes_a_token": weight_bytes, "read_rates": rates, "shares": shares}

    def overhead(self) -> dict[str, Any]:
        with self._load(PROMPT_TOKENS, 1) as model:
            steps = list(self._steps(model, PROMPT_TOKENS, 1))
        whole, backend, native = (
            statistics.median(getattr(step, name) * 1e3 for step in steps) for name in StepTime.__slots__
        )
        print(
            f"overhead: of {whole:.2f} ms a token {whole - backend:.2f} are outside the backend, {whole - native:.2f} "
            "outside native kernels"
        )
        return {"milliseconds": whole, "outside_backend": whole - backend, "outside_native": whole - native}

    def contexts(self, contexts: Sequence[int]) -> dict[str, Any]:
        with self._load(max(contexts), 1) as model:
            seconds = [self._median(model, length, 1) for length in contexts]
        return _growth("tokens before", contexts, seconds)

    def rows(self, rows: Sequence[int]) -> dict[str, Any]:
        with self._load(PROMPT_TOKENS, max(rows)) as model:
            seconds = [self._median(model, PROMPT_TOKENS, num_rows) for num_rows in rows]
        return _growth("requests", rows, seconds)

    def _load(self, prompt_tokens: int, max_batch: int) -> ErnieModel:
        return ErnieModel.from_pretrained(
            self._name,
            quantization=self._quantization,
            device="cpu",
            context_tokens=prompt_tokens + NEW_TOKENS + 2 * max_batch,
            max_batch=max_batch,
            progress=False,
        )

    def _median(self, model: ErnieModel, prompt_tokens: int, num_rows: int) -> float:
        return statistics.median(step.whole for step in self._steps(model, prompt_tokens, num_rows))

    def _steps(self, model: ErnieModel, prompt_tokens: int, num_rows: int) -> Iterator[StepTime]:
        """One for each repetition, after one that does not count."""
        for repetition in range(-1, self._num_repetitions):
            drawn = [draw_workload(next(self._numbers), model.spec.vocab_size, prompt_tokens) for _ in range(num_rows)]
            step = step_time(model, self._clock, [each.first_token.token_ids for each in drawn])
            if repetition >= 0:
                yield step


def _growth(title: str, sizes: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    line = Line.through(sizes, seconds)
    print(f"\n| {title} | ms a step |\n| ---: | ---: |")
    for size, each in zip(sizes, seconds, strict=True):
        print(f"| {size:,} | {each * 1e3:.2f} |")
    print(
        f"\n{line.start * 1e3:.2f} ms + {line.slope * 1e6:.3f} µs x {title}, at most {line.most_off:.0%} off",
        flush=True,
    )
    return {"sizes": list(sizes), "seconds": list(seconds), "line": asdict(line)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--what", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    options = parser.parse_args()
    limits = Limits(options.model, options.quantization, options.repetitions)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "reads": limits.reads,
        "overhead": limits.overhead,
        "contexts": lambda: limits.contexts(options.contexts),
        "rows": lambda: limits.rows(options.rows),
    }
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    results = {name: measures[name]() for name in options.what}
    if options.json is not None:
        result = {"machine": machine, "model": Path(options.model).name, "quantization": options.quantization}
        options.json.write_text(json.dumps({**result, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
