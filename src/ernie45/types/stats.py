"""Where the time of loading a model went, and what came of its guesses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCounts:
    """What became of routed experts that are read from disk as they are chosen.

    `hits` lay in memory when a layer wanted them, `misses` did not. `guesses` were read before a layer wanted them, of
    which `good_guesses` it did; one that was still being read then is neither hit nor miss. For misses and guesses
    `read_bytes` were read from files, and the model waited `stall_seconds`; the rest of the time they were read beside
    its work.
    """

    hits: int = 0
    misses: int = 0
    guesses: int = 0
    good_guesses: int = 0
    read_bytes: int = 0
    stall_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits over all; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def __add__(self, other: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            hits=self.hits + other.hits,
            misses=self.misses + other.misses,
            guesses=self.guesses + other.guesses,
            good_guesses=self.good_guesses + other.good_guesses,
            read_bytes=self.read_bytes + other.read_bytes,
            stall_seconds=self.stall_seconds + other.stall_seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStats:
    """What was measured of one model.

    `load_stages` are seconds by stage, in order: "find" (the folder, with downloads), "check" (config, headers, plan),
    "tokenizer", "weights" (reading and quantising `read_bytes` bytes of files), "compile" (where layers are compiled)
    and "engine". With `draft=`, `draft_tokens` were guessed so far, `accepted_draft_tokens` of them rightly. `experts`
    is None unless routed experts are read from disk as they are chosen.
    """

    load_stages: Mapping[str, float]
    read_bytes: int
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    experts: ExpertCounts | None = None

    @property
    def load_seconds(self) -> float:
        """All stages together."""
        return sum(self.load_stages.values())

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.load_stages.items())
        weights = self.load_stages.get("weights", 0.0)
        rate = f"; weights at {self.read_bytes / weights / 1e9:.2f} GB/s" if weights else ""
        guesses = ""
        if self.draft_tokens:
            share = self.accepted_draft_tokens / self.draft_tokens
            guesses = f"; {self.draft_tokens:,} tokens guessed, {share:.0%} of them rightly"
        experts = ""
        if self.experts is not None:
            read, seconds = self.experts.read_bytes / 1e9, self.experts.stall_seconds
            experts = (
                f"; {self.experts.hit_rate:.0%} of experts lay in memory, "
                f"{read:,.2f} GB were read from disk, and waited for {seconds:.1f} s"
            )
        return f"loaded in {self.load_seconds:.2f} s ({stages}{rate}){guesses}{experts}"


class StageClock:
    """Measures stages, one after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block to this stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
