"""`ernie45 bench`: how fast a model runs here, and what it takes in memory."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from ernie45.checkpoint.passing_thread import return_freed_memory
from ernie45.commands.bench_report import BenchReport, PresetSpeed
from ernie45.commands.doctor import diagnose
from ernie45.errors import InvalidRequestError
from ernie45.model import ErnieModel
from ernie45.presets import find_preset

# Special tokens and single bytes are among the first ids of a vocabulary, and among the last twentieth.
_LOWEST_ID, _HIGHEST_SHARE = 300, 0.95


def bench(
    model: str | os.PathLike[str],
    *,
    presets: Sequence[str] = ("auto",),
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 8,
    num_repetitions: int = 5,
    report_progress: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Load a model with one preset after the other, and measure each: a request alone, and `batch` at a time.

    Prompts are random and drawn afresh for each request; replies are greedy and never stop early. One round that does
    not count comes first. `report_progress` is given a line for each round.

    Raises:
        InvalidRequestError: a number below 1, or fewer than 2 new tokens.
        ErnieError: what `ErnieModel.from_pretrained` raises.
    """
    _check_at_least(1, prompt_tokens=prompt_tokens, batch=batch, num_repetitions=num_repetitions)
    _check_at_least(2, new_tokens=new_tokens)
    for preset in presets:
        find_preset(preset)
    return_freed_memory()  # else models would fill what was freed before, and their peaks would not show it
    before_bytes = psutil.Process().memory_info().rss
    rows = []
    for preset in dict.fromkeys(presets):
        _forget_peak()
        with ErnieModel.from_pretrained(
            model, quantization=preset, context_tokens=prompt_tokens + new_tokens, max_batch=batch, progress=False
        ) as loaded:
            rounds = _Rounds(loaded, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch)
            report_progress(f"{preset}: loaded in {loaded.stats.load_seconds:.1f} s")
            warm_up = rounds.run()
            report_progress(f"{preset}: warm-up, first token after {warm_up[0]:.3f} s")
            measured = []
            for repetition in range(1, num_repetitions + 1):
                measured.append(rounds.run())
                report_progress(f"{preset}: {repetition} of {num_repetitions}")
            first_seconds, decode_rates, batch_rates = zip(*measured, strict=True)
            peak_bytes = _peak_bytes()
            rows.append(
                PresetSpeed(
                    preset=loaded.load_report.preset,
                    device=loaded.load_report.device,
                    dtype=loaded.load_report.dtype,
                    weight_bytes=loaded.load_report.weight_bytes,
                    load_seconds=loaded.stats.load_seconds,
                    warm_up_seconds=warm_up[0],
                    first_token_seconds=first_seconds,
                    decode_rates=decode_rates,
                    batch_rates=batch_rates,
                    peak_bytes=None if peak_bytes is None else peak_bytes - before_bytes,
                    gpu_peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                    planned_peak_bytes=loaded.load_report.planned_peak_bytes,
                )
            )
    return BenchReport(
        model=str(model),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        machine=_describe_machine(),
        rows=tuple(rows),
    )


class _Rounds:
    """Rounds of requests to one model."""

    def __init__(self, model: ErnieModel, *, prompt_tokens: int, new_tokens: int, batch: int) -> None:
        self._model = model
        self._prompt_tokens, self._new_tokens, self._batch = prompt_tokens, new_tokens, batch
        highest_id = max(1, int(_HIGHEST_SHARE * model.spec.vocab_size))
        self._ids = range(min(_LOWEST_ID, highest_id - 1), highest_id)

    def run(self) -> tuple[float, float, float]:
        """Seconds to the first token of a request alone, tokens per second after it, and those of a batch."""
        started = time.perf_counter()
        chunks = self._model.stream_generate(
            self._draw(), max_new_tokens=self._new_tokens, temperature=0, ignore_eos=True
        )
        times = [time.perf_counter() for chunk in chunks for _ in chunk.token_ids]
        prompts = [self._draw() for _ in range(self._batch)]
        batch_started = time.perf_counter()
        self._model.batch_generate(prompts, max_new_tokens=self._new_tokens, temperature=0, ignore_eos=True)
        batch_seconds = time.perf_counter() - batch_started
        return (
            times[0] - started,
            (len(times) - 1) / (times[-1] - times[0]),
            self._batch * self._new_tokens / batch_seconds,
        )

    def _draw(self) -> list[int]:
        return random.choices(self._ids, k=self._prompt_tokens)


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise InvalidRequestError(f"{name} is {number}", hint=f"use {least} or more")


def _forget_peak() -> None:
    """Have the peaks of memory count from now on."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without it: peaks count from the start of the process
            Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int | None:
    """The most main memory that this process has taken; None where the system does not count anew when asked."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _describe_machine() -> str:
    found = diagnose()
    parts = [f"{found.processor}, {found.num_usable_cpus} CPUs, {found.memory_bytes / 2**30:.1f} GiB", *found.gpus]
    kernels = "torch's kernels" if found.instruction_set is None else f"native kernels for {found.instruction_set}"
    return "; ".join([*parts, f"ernie45 {found.ernie45}, torch {found.torch}, {kernels}, {found.system}"])
