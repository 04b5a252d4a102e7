"""Measured rates, the machine they were measured on, and both as a table or JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sides import OURS

PACKAGES = ("ernie45", "torch", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kind of work: tokens per second of each side, one number for each repetition, in the same order."""

    work: str
    rates: Mapping[str, Sequence[float]]

    def median(self, side: str) -> float:
        return statistics.median(self.rates[side])

    def ratios(self, other: str) -> list[float]:
        """Our rate over the other's, repetition by repetition, so that what slowed both does not count."""
        return [ours / theirs for ours, theirs in zip(self.rates[OURS], self.rates[other], strict=True)]

    def others(self) -> list[str]:
        return [side for side in self.rates if side != OURS]

    def as_json(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "unit": "tokens/s",
            "rates": {side: [round(rate, 2) for rate in rates] for side, rates in self.rates.items()},
            "median": {side: round(self.median(side), 2) for side in self.rates},
            "median_ratio": {side: round(statistics.median(self.ratios(side)), 3) for side in self.others()},
        }


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table: medians, and beside each other side how many times as fast ours is (lowest to highest)."""
    others = list(dict.fromkeys(side for row in rows for side in row.others()))
    lines = [
        "| tokens per second | " + " | ".join((OURS, *others)) + " |",
        "| --- |" + " ---: |" * (1 + len(others)),
    ]
    for row in rows:
        cells = [_compared(row, side) if side in row.rates else "" for side in others]
        lines.append(f"| {row.work} | {row.median(OURS):.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _compared(row: Row, side: str) -> str:
    ratios = row.ratios(side)
    return f"{row.median(side):.1f} (x {statistics.median(ratios):.2f}; {min(ratios):.2f} to {max(ratios):.2f})"


def describe_machine() -> dict[str, Any]:
    """CPU, memory, and the versions that matter."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
