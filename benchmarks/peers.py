"""Speed of ernie45 beside other engines, each in a process and a Python of its own, taking turns.

python -m benchmarks.peers MODEL --quantization int4 --peer llama.cpp PYTHON FILE.gguf [--peer vllm PYTHON FOLDER ...]
                           [--what prefill decode batch] [--prompt-tokens 512 ...] [--repetitions 5]
                           [--one-at-a-time] [--json FILE]

All sides stay loaded, and those that wait are stopped, so that no pool of threads spins beside the one that computes.
Where memory does not hold all, `--one-at-a-time` loads a side for each of its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import psutil
from typing_extensions import Self

from benchmarks.reads import read_rate
from benchmarks.report import Row, as_table, describe_machine
from benchmarks.sides import OURS
from benchmarks.workloads import NEW_TOKENS, NUM_REQUESTS, Request, Workload, draw_workload

# The module of each peer, and what its command line has beside the file or folder.
PEERS: Mapping[str, tuple[str, ...]] = {
    "llama.cpp": ("benchmarks.peer_llama_cpp",),
    "vllm": ("benchmarks.peer_vllm",),
    "openvino": ("benchmarks.peer_openvino",),
    "transformers": ("benchmarks.peer_transformers",),
    "transformers-static": ("benchmarks.peer_transformers", "--cache", "static"),
    "transformers-compiled": ("benchmarks.peer_transformers", "--cache", "static", "--compile"),
}
KINDS = ("prefill", "decode", "batch")
# The first calls compile, pack and allocate; a second shows what the first compiled for its lengths alone.
NUM_WARMUPS = 2
_WARM_UP = Request(token_ids=tuple(range(1000, 1016)), num_new_tokens=4)
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A side's name in the report, and the command that runs its process."""

    name: str
    command: tuple[str, ...]


@final
class SideProcess:
    """The process of a side, stopped while it is not asked; leaving the `with` block ends it."""

    def __init__(self, contender: Contender) -> None:
        # A group of its own, to stop with all it starts. Should this program die, the system ends a stopped group.
        self._process = subprocess.Popen(
            contender.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            preexec_fn=os.setpgrp,
        )
        self._name = contender.name
        self.others: list[float] = []
        self.description: dict[str, Any] = self._answer()

    def seconds(self, requests: Sequence[Request]) -> list[float]:
        """What the side measures: see `peer_protocol`. `others` gets the share of all CPUs that other programs took."""
        assert self._process.stdin is not None
        started, others_before = time.perf_counter(), self._cpu_seconds_of_others()
        os.killpg(self._process.pid, signal.SIGCONT)
        print(json.dumps([[each.token_ids, each.num_new_tokens] for each in requests]), file=self._process.stdin)
        self._process.stdin.flush()
        seconds: list[float] = self._answer()
        passed = (time.perf_counter() - started) * (os.cpu_count() or 1)
        self.others.append((self._cpu_seconds_of_others() - others_before) / passed)
        return seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._process.wait(timeout=20)
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _cpu_seconds_of_others(self) -> float:
        """Since the machine started: of all processes and what a host took, less those of this side."""
        machine = psutil.cpu_times()
        leader = psutil.Process(self._process.pid)
        own = sum(sum(each.cpu_times()[:2]) for each in (leader, *leader.children(recursive=True)))
        return machine.user + machine.nice + machine.system + machine.steal - own

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended: what it said is above")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Rates in tokens per second by work and side.

    `read_rates` are bytes a second that memory was read at, one a repetition; `others` the shares of the CPUs that
    other programs took, one a turn.
    """

    rows: list[Row] = field(default_factory=list)
    read_rates: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    descriptions: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure(
    contenders: Sequence[Contender],
    kinds: Sequence[str],
    *,
    vocab_size: int,
    prompt_tokens: Sequence[int],
    num_repetitions: int,
    one_at_a_time: bool,
) -> Measured:
    """Measure every kind of work on every side, repetition by repetition, in an order that turns round."""
    rates: dict[str, dict[str, list[float]]] = {}
    measured = Measured()
    with ExitStack() as stack:
        processes = {} if one_at_a_time else {each.name: _start(each, stack, measured) for each in contenders}
        for repetition in range(0 if one_at_a_time else -NUM_WARMUPS, num_repetitions):
            workloads = [
                draw_workload(repetition * len(prompt_tokens) + index, vocab_size, length)
                for index, length in enumerate(prompt_tokens)
            ]
            if repetition >= 0:
                measured.read_rates.append(read_rate())
            for contender in contenders if repetition % 2 else contenders[::-1]:
                with _turn(contender, processes, measured) as process:
                    for work, rate in _rates(process, kinds, workloads):
                        _report_progress(repetition, work, contender.name, rate)
                        if repetition >= 0:
                            measured.others.append(process.others[-1])
                            rates.setdefault(work, {}).setdefault(contender.name, []).append(rate)
    names = [each.name for each in contenders]
    measured.rows.extend(Row(work=work, rates={name: sides[name] for name in names}) for work, sides in rates.items())
    return measured


def _start(contender: Contender, stack: ExitStack, measured: Measured) -> SideProcess:
    process = stack.enter_context(SideProcess(contender))
    measured.descriptions[contender.name] = process.description
    return process


@contextmanager
def _turn(contender: Contender, processes: Mapping[str, SideProcess], measured: Measured) -> Iterator[SideProcess]:
    """The side's process; one that is loaded for this turn is warmed up by a short request."""
    if contender.name in processes:
        yield processes[contender.name]
        return
    with ExitStack() as stack:
        process = _start(contender, stack, measured)
        process.seconds([_WARM_UP])
        yield process


def _rates(process: SideProcess, kinds: Sequence[str], workloads: Sequence[Workload]) -> Iterator[tuple[str, float]]:
    """Tokens per second of each work. Decoding follows the last of the prompts."""
    for workload in workloads:
        decodes = "decode" in kinds and workload is workloads[-1]
        request = workload.decode if decodes else workload.first_token
        if "prefill" in kinds or decodes:
            first_seconds, other_seconds = process.seconds([request])
            length = len(request.token_ids)
            if "prefill" in kinds:
                yield f"prompt of {length}", length / first_seconds
            if decodes:
                yield f"{NEW_TOKENS} new after a prompt of {length}", NEW_TOKENS / other_seconds
    if "batch" in kinds:
        (seconds,) = process.seconds(workloads[-1].mixed)
        yield f"{NUM_REQUESTS} mixed requests", sum(each.num_new_tokens for each in workloads[-1].mixed) / seconds


def _report_progress(repetition: int, work: str, side: str, rate: float) -> None:
    label = f"repetition {repetition + 1}" if repetition >= 0 else "warm-up"
    print(f"{label}: {work}, {side}: {rate:.1f} tokens/s", file=sys.stderr, flush=True)


def share_of_reads(measured: Measured) -> list[float]:
    """By repetition, the weights that our decoding read per second over what this machine reads."""
    weight_bytes = measured.descriptions[OURS]["weight_bytes_a_token"]
    decoding = [row.rates[OURS] for row in measured.rows if row.work.startswith(f"{NEW_TOKENS} new")]
    return [
        weight_bytes * rate / read for rates in decoding for rate, read in zip(rates, measured.read_rates, strict=True)
    ]


def _contenders(options: argparse.Namespace) -> list[Contender]:
    max_batch = NUM_REQUESTS if "batch" in options.what else 1
    ours = (
        *(sys.executable, "-m", "benchmarks.ours", _resolved(options.model)),
        *("--quantization", options.quantization, "--max-batch", str(max_batch)),
    )
    contenders = [Contender(name=OURS, command=ours)]
    for peer, python, path in options.peer:
        if peer not in PEERS:
            raise SystemExit(f"{peer!r} is no peer: name one of {', '.join(PEERS)}")
        module, *arguments = PEERS[peer]
        file = Path(path).stem if peer in ("llama.cpp", "openvino") else ""
        # Not resolved: a virtual environment's Python is a link.
        command = (str(Path(python).absolute()), "-m", module, _resolved(path), *arguments)
        contenders.append(Contender(name=f"{peer} {file}".strip(), command=command))
    return contenders


def _resolved(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder for ernie45")
    parser.add_argument("--quantization", default="none", help="of ernie45: none, int8 or int4")
    parser.add_argument(
        "--peer", nargs=3, action="append", default=[], metavar=("PEER", "PYTHON", "PATH"), help=", ".join(PEERS)
    )
    parser.add_argument("--what", nargs="+", choices=KINDS, default=["prefill", "decode"])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    measured = measure(
        _contenders(options),
        options.what,
        vocab_size=json.loads((Path(options.model) / "config.json").read_text())["vocab_size"],
        prompt_tokens=options.prompt_tokens,
        num_repetitions=options.repetitions,
        one_at_a_time=options.one_at_a_time,
    )
    machine = {
        **describe_machine(),
        "reads_gb_a_second": round(statistics.median(measured.read_rates) / 1e9, 1),
        "cpu_share_of_others": f"{statistics.median(measured.others):.0%} (at most {max(measured.others):.0%})",
    }
    print(f"{Path(options.model).name}, ernie45 with {options.quantization}\n\n{as_table(measured.rows)}\n")
    shares = share_of_reads(measured)
    if shares:
        print(f"decoding reads weights at {statistics.median(shares):.0%} of the rate at which this machine reads")
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json is not None:
        result = {
            "machine": machine,
            "model": Path(options.model).name,
            "quantization": options.quantization,
            "sides": measured.descriptions,
            "rows": [row.as_json() for row in measured.rows],
            "share_of_reads": [round(share, 3) for share in shares],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
