"""How long loading takes: a cold process to its first token beside transformers, and quantising beside reloading.

python -m benchmarks.loading FOLDER [--what first-token reload] [--repetitions 5] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROMPT = "人工智能的发展前景"
WORK = ("first-token", "reload")


def ours(folder: str) -> float:
    """Seconds from the first import to the first token, by ernie45."""
    started = time.perf_counter()
    from ernie45 import ErnieModel

    with ErnieModel.from_pretrained(folder, quantization="none", device="cpu", progress=False) as model:
        next(iter(model.stream_generate(PROMPT, max_new_tokens=1, temperature=0)))
        return time.perf_counter() - started


def transformers(folder: str) -> float:
    """The same by transformers, in the dtype of the files."""
    started = time.perf_counter()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - started


def load_int4(folder: str) -> tuple[float, float]:
    """Seconds of building the weights, and of the whole load, of a model as int4."""
    from ernie45 import ErnieModel

    with ErnieModel.from_pretrained(folder, quantization="int4", device="cpu", progress=False) as model:
        stats = model.stats
        return stats.load_stages["weights"], stats.load_seconds


def save_int4(source: str, folder: str) -> None:
    """Write the int4 folder that is loaded again."""
    from ernie45 import ErnieModel

    with ErnieModel.from_pretrained(source, quantization="int4", device="cpu", progress=False) as model:
        model.save_pretrained(folder, progress=False)


_SIDES: dict[str, Callable[[str], object]] = {"ernie45": ours, "transformers": transformers, "int4": load_int4}


def in_new_process(side: str, folder: str, threads: int) -> list[float]:
    """What a side measures in a process of its own; its files are in the system's cache after the first."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", folder, "--side", side],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured if isinstance(measured, list) else [measured]


def alternate(sides: Sequence[tuple[str, str]], repetitions: int, threads: int) -> list[list[list[float]]]:
    """For each side, a name and its folder, what each repetition measured. They take turns, first each once to warm the
    system's cache, and the order turns round with every repetition."""
    for side, folder in sides:
        in_new_process(side, folder, threads)
    measured: list[list[list[float]]] = [[] for _ in sides]
    for repetition in range(repetitions):
        for index in range(len(sides))[:: 1 if repetition % 2 == 0 else -1]:
            measured[index].append(in_new_process(*sides[index], threads))
    return measured


def report(title: str, names: tuple[str, str], first: list[float], second: list[float]) -> dict[str, object]:
    """Print medians in seconds, and the median of the ratios within a repetition."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    ratio = statistics.median(ratios)
    medians = [statistics.median(seconds) for seconds in (first, second)]
    print(
        f"{title:24}{names[0]} {medians[0]:.2f} s, {names[1]} {medians[1]:.2f} s, ratio {ratio:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    return {"what": title, names[0]: first, names[1]: second, "ratio": ratio}


def compare_first_token(folder: str, repetitions: int, threads: int) -> list[dict[str, object]]:
    """A cold process up to its first token, ours and transformers'."""
    mine, theirs = alternate([("ernie45", folder), ("transformers", folder)], repetitions, threads)
    names = ("ernie45", "transformers")
    return [report("first token", names, [one[0] for one in mine], [one[0] for one in theirs])]


def compare_reload(folder: str, repetitions: int, threads: int) -> list[dict[str, object]]:
    """Quantising to int4 while loading, and loading the int4 folder that was saved of it."""
    with tempfile.TemporaryDirectory(prefix="ernie45-int4-") as saved:
        save_int4(folder, saved)
        reloaded, quantised = alternate([("int4", saved), ("int4", folder)], repetitions, threads)
    names = ("reloading", "quantising")
    return [
        report(title, names, [one[index] for one in reloaded], [one[index] for one in quantised])
        for index, title in enumerate(("int4: build of weights", "int4: whole load"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a text model with a tokenizer, such as the shape of ERNIE-4.5-0.3B-PT")
    parser.add_argument("--what", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--side", choices=_SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(_SIDES[options.side](options.folder)))
        return
    results: list[dict[str, object]] = []
    if "first-token" in options.what:
        results += compare_first_token(options.folder, options.repetitions, options.threads)
    if "reload" in options.what:
        results += compare_reload(options.folder, options.repetitions, options.threads)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
