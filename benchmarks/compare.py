"""Compare the speed of ernie45 and transformers on one checkpoint, alternating between them in one run.

python -m benchmarks.compare FOLDER [--what decode|prefill|batch|all] [--prompt-tokens 512] [--repetitions 5]
                             [--against eager|static|compiled ...] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from benchmarks.report import Row, as_table, describe_machine
from benchmarks.sides import COMPILED, EAGER, OURS, STATIC
from benchmarks.workers import Worker
from benchmarks.workloads import Request, Workload, draw_workload

PEERS = {"eager": EAGER, "static": STATIC, "compiled": COMPILED}
TITLES = {
    "prefill": "prompt of {prompt_tokens}",
    "decode": "64 new after a prompt of {prompt_tokens}",
    "batch": "32 mixed requests together",
}
# The first calls compile, pack and allocate; a second shows what the first compiled for its lengths alone.
NUM_WARMUPS = 2

Measure: TypeAlias = Callable[[Worker, Workload], float]


def prefill_rate(worker: Worker, workload: Workload) -> float:
    request = workload.first_token
    return len(request.token_ids) / worker.seconds(request)


def decode_rate(worker: Worker, workload: Workload) -> float:
    """Of the tokens after the first: what a reply takes longer than its first token alone."""
    first_seconds = worker.seconds(workload.first_token)
    return (workload.decode.num_new_tokens - 1) / (worker.seconds(workload.decode) - first_seconds)


def batch_rate(worker: Worker, workload: Workload) -> float:
    """Of the tokens asked for; what padding and waiting in a group add does not count."""
    return _num_new_tokens(workload.mixed) / worker.seconds(workload.mixed)


MEASURES: Mapping[str, Measure] = {"prefill": prefill_rate, "decode": decode_rate, "batch": batch_rate}


def compare(
    folder: Path, kinds: Sequence[str], peers: Sequence[str], *, prompt_tokens: int, num_repetitions: int
) -> list[Row]:
    """Measure each kind of work `num_repetitions` times on every side, in alternating order.

    The batch is only compared with eager transformers: the other two would compile for each group's lengths.
    """
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    sides_of = {kind: (OURS, EAGER) if kind == "batch" else (OURS, *peers) for kind in kinds}
    names = list(dict.fromkeys(side for sides in sides_of.values() for side in sides))
    rates: dict[str, dict[str, list[float]]] = {kind: {side: [] for side in sides_of[kind]} for kind in kinds}
    with ExitStack() as stack:
        workers = {}
        for name in names:  # one after the other: a load that competes with another is no harm, but takes longer
            workers[name] = stack.enter_context(Worker(name, folder))
            workers[name].wait_until_loaded()
        for repetition in range(-NUM_WARMUPS, num_repetitions):
            workload = draw_workload(repetition, vocab_size, prompt_tokens)
            for kind in kinds:
                sides = sides_of[kind] if repetition % 2 else sides_of[kind][::-1]
                for side in sides:
                    rate = MEASURES[kind](workers[side], workload)
                    _report_progress(repetition, kind, side, rate)
                    if repetition >= 0:
                        rates[kind][side].append(rate)
    return [Row(work=TITLES[kind].format(prompt_tokens=prompt_tokens), rates=rates[kind]) for kind in kinds]


def _num_new_tokens(requests: Sequence[Request]) -> int:
    return sum(request.num_new_tokens for request in requests)


def _report_progress(repetition: int, kind: str, side: str, rate: float) -> None:
    label = f"repetition {repetition + 1}" if repetition >= 0 else "warm-up"
    print(f"{label}: {kind}, {side}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint in the -PT layout; make_checkpoint writes one")
    parser.add_argument("--what", choices=[*MEASURES, "all"], default="all")
    parser.add_argument("--against", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    kinds = list(MEASURES) if options.what == "all" else [options.what]
    rows = compare(
        options.folder,
        kinds,
        [PEERS[name] for name in options.against],
        prompt_tokens=options.prompt_tokens,
        num_repetitions=options.repetitions,
    )
    machine = describe_machine()
    print(as_table(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json is not None:
        result = {"machine": machine, "checkpoint": options.folder.name, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
