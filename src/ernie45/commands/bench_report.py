"""What `ernie45 bench` measured, and how it is printed and drawn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ernie45.commands.bench_plot import draw_bars, number_in_words
from ernie45.commands.text_table import text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetSpeed:
    """A model loaded in one way. Rates are in tokens per second, one number for each repetition.

    Attributes:
        warm_up_seconds: to the first token of the first request, which does not count.
        first_token_seconds: to the first token of a request alone, after its whole prompt.
        decode_rates: of the tokens after the first.
        batch_rates: of all new tokens of requests that run together, the time of their prompts included.
        peak_bytes: the most main memory above the state before loading; None where that cannot be known.
        gpu_peak_bytes: the most memory of the GPU in use; None without one.
        planned_peak_bytes: what was planned, on all devices together.
    """

    preset: str
    device: str
    dtype: str
    weight_bytes: int
    load_seconds: float
    warm_up_seconds: float
    first_token_seconds: Sequence[float]
    decode_rates: Sequence[float]
    batch_rates: Sequence[float]
    peak_bytes: int | None
    gpu_peak_bytes: int | None
    planned_peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """A model by the ways to load it, in the order asked for. `str()` gives tables."""

    model: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    machine: str
    rows: tuple[PresetSpeed, ...]

    def json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def measures(self) -> dict[str, list[Sequence[float]]]:
        """What was measured, in words with its unit, and for each of `rows` one number a repetition."""
        return {
            "time to first token, ms": [[1e3 * value for value in row.first_token_seconds] for row in self.rows],
            "prefill, tokens/s": [
                [self.prompt_tokens / value for value in row.first_token_seconds] for row in self.rows
            ],
            "decode, tokens/s": [row.decode_rates for row in self.rows],
            f"{self.batch} at a time, tokens/s": [row.batch_rates for row in self.rows],
        }

    def __str__(self) -> str:
        num_repetitions = len(self.rows[0].decode_rates)
        return "\n\n".join(
            [
                f"{self.model}: prompts of {self.prompt_tokens:,} random tokens, {self.new_tokens:,} new; "
                f"medians of {num_repetitions} (lowest to highest)",
                text_table([["", *(row.preset for row in self.rows)], *self._speed_lines()]),
                text_table([["", *(row.preset for row in self.rows)], *self._memory_lines()]),
                self.machine,
            ]
        )

    def svg(self) -> str:
        """A drawing of the speeds and the memory: a bar for each preset, with a line from the lowest to the highest."""
        peaks: list[Sequence[float]] = [[(row.peak_bytes or row.planned_peak_bytes) / 1e6] for row in self.rows]
        is_measured = all(row.peak_bytes is not None for row in self.rows)
        panels = {**self.measures(), f"peak memory, MB{'' if is_measured else ' (planned)'}": peaks}
        title = f"{self.model}: prompts of {self.prompt_tokens:,} tokens, {self.new_tokens:,} new"
        return draw_bars(title, self.machine, [row.preset for row in self.rows], panels)

    def _speed_lines(self) -> Iterator[list[str]]:
        for title, all_values in self.measures().items():
            yield [title, *map(_spread, all_values)]

    def _memory_lines(self) -> Iterator[list[str]]:
        yield ["weights, MB", *(_megabytes(row.weight_bytes) for row in self.rows)]
        yield ["peak, MB", *(_megabytes(row.peak_bytes) for row in self.rows)]
        if any(row.gpu_peak_bytes is not None for row in self.rows):
            yield ["peak of the GPU, MB", *(_megabytes(row.gpu_peak_bytes) for row in self.rows)]
        yield ["planned peak, MB", *(_megabytes(row.planned_peak_bytes) for row in self.rows)]
        yield ["load, s", *(f"{row.load_seconds:.2f}" for row in self.rows)]
        yield ["warm-up: first token, ms", *(number_in_words(1e3 * row.warm_up_seconds) for row in self.rows)]
        yield ["device", *(f"{row.device}, {row.dtype}" for row in self.rows)]


def _spread(values: Sequence[float]) -> str:
    median, lowest, highest = map(number_in_words, (statistics.median(values), min(values), max(values)))
    return f"{median} ({lowest} to {highest})"


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.1f}"
