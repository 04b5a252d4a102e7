"""Where the time of loading a model went, and what came of its guesses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStats:
    """What was measured of one model.

    `load_stages` are seconds by stage, in order: "find" (the folder, with downloads), "check" (config, headers, plan),
    "tokenizer", "weights" (reading and quantising `read_bytes` bytes of files), "compile" (where layers are compiled)
    and "engine". With `draft=`, `draft_tokens` were guessed so far, `accepted_draft_tokens` of them rightly.
    """

    load_stages: Mapping[str, float]
    read_bytes: int
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

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
        return f"loaded in {self.load_seconds:.2f} s ({stages}{rate}){guesses}"


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
