"""Models larger than memory: what a plan says of decoding in less memory than the weights take, and what is measured.

python -m benchmarks.streaming FOLDER [--limits 4GiB 6GiB 8GiB 12GiB] [--prompts 3] [--new-tokens 16]
                               [--repetitions 3] [--rows 1 8] [--peer-llama PYTHON FILE.gguf] [--peer-tokens 6]
                               [--json FILE] [--plot FILE.svg]

Each repetition is a process of its own, in a memory cgroup where one can be made (Linux, as root), else with `memory=`
alone. One before them, with the last limit, records which experts are chosen for other prompts: that is what plans go
by. Tokens are drawn at temperature 1: checkpoints with random weights repeat themselves when decoding is greedy, and
what repeats itself finds its experts in memory. llama.cpp gets the same limit, with its file mapped into memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.line_plot import draw_lines
from benchmarks.memory_group import forget, memory_group
from benchmarks.peers import Contender, SideProcess
from benchmarks.report import describe_machine
from benchmarks.streamed_decoding import PROMPT_TOKENS, Decoded, Report, Turn
from benchmarks.workloads import Request
from ernie45.memory.budget import parse_bytes

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """llama.cpp: a Python that has it, and its file."""

    python: str
    file: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """All repetitions with one limit; `peer_rates` are tokens a second."""

    limit: str
    is_grouped: bool
    reports: Sequence[Report]
    peer_rates: Sequence[float]

    def median(self, number: Callable[[Report], float | None]) -> float | None:
        """Over the repetitions; None where there is no such number."""
        numbers = [each for each in map(number, self.reports) if each is not None]
        return statistics.median(numbers) if numbers else None

    def rate(self, rows: int) -> float:
        """Tokens a second of so many requests together."""
        return statistics.median(
            each.tokens_per_second for report in self.reports for each in report.decoded if each.rows == rows
        )


def measure(options: argparse.Namespace, limit: str, trace: Path, peer: Peer | None) -> Measured:
    """ernie45 and the peer in turns, each in a group of its own with nothing of its files in the system's cache."""
    reports, peer_rates = [], []
    for repetition in range(options.repetitions):
        report, is_grouped = run(_turn(options, limit, seed=repetition, planned_by=str(trace)))
        reports.append(report)
        print(f"{limit}, {repetition + 1}: {reports[-1]}", file=sys.stderr, flush=True)
        if peer is not None:
            peer_rates.append(_peer_rate(peer, limit, options.peer_tokens, repetition))
            print(f"{limit}, {repetition + 1}: llama.cpp {peer_rates[-1]:.2f} tokens/s", file=sys.stderr, flush=True)
    return Measured(limit=limit, is_grouped=is_grouped, reports=reports, peer_rates=peer_rates)


def run(turn: Turn) -> tuple[Report, bool]:
    """In a process of its own; also whether that had a memory cgroup."""
    with memory_group(parse_bytes(turn.limit)) as group:
        forget(Path(turn.folder))
        command = group.command((sys.executable, "-m", "benchmarks.streamed_decoding", json.dumps(asdict(turn))))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=_ROOT)
    return _report(json.loads(done.stdout.splitlines()[-1])), group.folder is not None


def _turn(options: argparse.Namespace, limit: str, *, seed: int, **files: str) -> Turn:
    return Turn(
        folder=str(options.folder.resolve()),
        limit=limit,
        num_prompts=options.prompts,
        new_tokens=options.new_tokens,
        rows=options.rows,
        seed=seed,
        **files,
    )


def _report(values: dict[str, Any]) -> Report:
    return Report(**{**values, "decoded": [Decoded(**each) for each in values["decoded"]]})


def _peer_rate(peer: Peer, limit: str, num_new_tokens: int, seed: int) -> float:
    prompt = tuple(random.Random(f"streaming peer {seed}").choices(range(300, 100_000), k=PROMPT_TOKENS))
    with memory_group(parse_bytes(limit)) as group:
        forget(peer.file)
        command = group.command((peer.python, "-m", "benchmarks.peer_llama_cpp", str(peer.file), "--mapped"))
        with SideProcess(Contender(name="llama.cpp", command=command)) as process:
            _, seconds = process.seconds([Request(token_ids=prompt, num_new_tokens=num_new_tokens + 1)])
    return num_new_tokens / seconds


def _share_of_disk(report: Report, decoded: Decoded) -> float | None:
    """Measured tokens a second over those that the disk allows: its rate over the bytes that a token misses."""
    return decoded.tokens_per_second * decoded.missed_bytes / report.disk_rate if decoded.missed_bytes else None


def as_table(measured: Sequence[Measured]) -> str:
    """A Markdown table: of what is planned, the planned number before the measured one."""
    lines = [
        "| limit | experts held | of all | found in memory | MB missed a token | MB read | seconds a token | waited "
        "| disk, GB/s | of what the disk allows | peak, GiB |",
        "| --- |" + " ---: |" * 10,
    ]
    lines += [f"| {' | '.join((each.limit, *_cells(each)))} |" for each in measured]
    return "\n".join(lines)


def _cells(measured: Measured) -> tuple[str, ...]:
    seconds = _pair(measured, lambda it: it.seconds, lambda it: 1 / it.decoded[0].tokens_per_second, "{:.3f}")
    peak = _one(measured, lambda it: it.peak_bytes / 2**30, "{:.2f}")
    if measured.reports[0].expert_slots is None:  # nothing streams
        return ("all", "", "", "", "", seconds, "", "", "", peak)
    return (
        _pair(measured, lambda it: it.expert_slots, lambda it: it.num_experts, "{:,.0f}", " of "),
        _one(measured, lambda it: it.even_hit_rate, "{:.0%}"),
        _pair(measured, lambda it: it.hit_rate, lambda it: it.decoded[0].hit_rate, "{:.0%}"),
        _pair(measured, lambda it: (it.read_bytes or 0) / 1e6, lambda it: it.decoded[0].missed_bytes / 1e6, "{:,.0f}"),
        _one(measured, lambda it: it.decoded[0].read_bytes / it.decoded[0].num_tokens / 1e6, "{:,.0f}"),
        seconds,
        _one(measured, lambda it: it.decoded[0].stall_seconds / it.decoded[0].num_tokens, "{:.3f}"),
        _one(measured, lambda it: it.disk_rate / 1e9, "{:.2f}"),
        _one(measured, lambda it: _share_of_disk(it, it.decoded[0]), "{:.0%}"),
        peak,
    )


def _one(measured: Measured, number: Callable[[Report], float | None], form: str) -> str:
    value = measured.median(number)
    return "" if value is None else form.format(value)


def _pair(
    measured: Measured,
    first: Callable[[Report], float | None],
    second: Callable[[Report], float | None],
    form: str,
    between: str = " / ",
) -> str:
    return between.join(filter(None, (_one(measured, first, form), _one(measured, second, form))))


def _rates(measured: Measured, rows: Sequence[int]) -> str:
    rates = ", ".join(f"{count} at a time {measured.rate(count):.2f}" for count in rows)
    line = f"{measured.limit}: tokens a second: {rates}"
    if measured.peer_rates:
        peer = statistics.median(measured.peer_rates)
        ratios = [
            report.decoded[0].tokens_per_second / rate
            for report, rate in zip(measured.reports, measured.peer_rates, strict=True)
        ]
        line += f"; llama.cpp {peer:.2f} (x {statistics.median(ratios):.1f}; {min(ratios):.1f} to {max(ratios):.1f})"
    return line if measured.is_grouped else f"{line} (no cgroup could be made: `memory=` alone)"


def plot(name: str, measured: Sequence[Measured], machine: Mapping[str, Any]) -> str:
    """Tokens a second of a single request by the limit, measured and planned."""
    lines = {"measured": [(_gib(each.limit), each.rate(1)) for each in measured]}
    planned = [(_gib(each.limit), each.median(lambda report: report.seconds)) for each in measured]
    if points := [(limit, 1 / seconds) for limit, seconds in planned if seconds is not None]:
        lines["planned"] = points
    if peers := [(_gib(each.limit), statistics.median(each.peer_rates)) for each in measured if each.peer_rates]:
        lines["llama.cpp"] = peers
    note = f"{machine['cpu']}, {machine['cores']} cores; random weights; medians"
    return draw_lines(f"{name} in less memory than it takes", note, ("memory, GiB", "tokens a second"), lines)


def _gib(limit: str) -> float:
    return parse_bytes(limit) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a packed folder of a model with experts")
    parser.add_argument("--limits", nargs="+", default=["4GiB", "6GiB", "8GiB", "12GiB"], metavar="SIZE")
    parser.add_argument("--prompts", type=int, default=3, help="in each process; a multiple of each number of rows")
    parser.add_argument("--new-tokens", type=int, default=16, help="after each prompt")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1], metavar="N", help="requests at a time; 1 comes first"
    )
    parser.add_argument("--peer-llama", nargs=2, metavar=("PYTHON", "FILE"))
    parser.add_argument("--peer-tokens", type=int, default=6, help="how many the peer decodes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw tokens a second there, as SVG")
    options = parser.parse_args()
    if any(options.prompts % rows for rows in options.rows):
        parser.error("--prompts must be a multiple of each of --rows, so that all run the same requests")
    peer = None
    if options.peer_llama:
        # Not resolved: a virtual environment's Python is a link.
        peer = Peer(python=str(Path(options.peer_llama[0]).absolute()), file=Path(options.peer_llama[1]).resolve())
    with tempfile.TemporaryDirectory(prefix="ernie45-streaming-") as scratch:
        trace = Path(scratch) / "trace.npz"
        run(replace(_turn(options, options.limits[-1], seed=-1, record_to=str(trace)), rows=[1]))
        measured = [measure(options, limit, trace, peer) for limit in options.limits]
    machine = describe_machine()
    print(f"{options.folder.name}\n\n{as_table(measured)}\n")
    print("\n".join(_rates(each, options.rows) for each in measured))
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json is not None:
        result = {"machine": machine, "model": options.folder.name, "limits": [asdict(each) for each in measured]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot is not None:
        options.plot.write_text(plot(options.folder.name, measured, machine))


if __name__ == "__main__":
    main()
