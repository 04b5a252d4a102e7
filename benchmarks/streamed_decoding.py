"""Decoding with a limit on memory, in this process: what was planned, and what it took. For `benchmarks.streaming`."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ernie45 import ErnieModel, MemoryPlan, RoutingTrace, plan_memory
from ernie45.memory.disk_rate import disk_rate
from ernie45.types.stats import ExpertCounts

PROMPT_TOKENS = 24  # a prompt of up to 16 would be counted as decoding by replays
_CONTEXT_TOKENS = 1024
_WARM_UP_TOKENS = 64  # of a prompt that fills the slots
# Below these ids are special tokens, digits and bytes; above are unused ones.
_LOWEST_ID, _HIGHEST_ID = 300, 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What is run: a model with a limit, and for each of `rows` the same `num_prompts` requests, so many at a time.

    What is chosen is recorded to the file `record_to`, or the plan made by what `planned_by` holds."""

    folder: str
    limit: str
    num_prompts: int
    new_tokens: int
    rows: Sequence[int]
    seed: int
    record_to: str | None = None
    planned_by: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Tokens of `rows` requests, the seconds that they took, and what became of experts meanwhile.

    `num_chosen` is how many experts the tokens went through, layer by layer.
    """

    rows: int
    num_tokens: int
    seconds: float
    num_chosen: int
    misses: int
    guesses: int
    good_guesses: int
    read_bytes: int
    stall_seconds: float

    @staticmethod
    def together(parts: Sequence[Decoded]) -> Decoded:
        """What was decoded one after the other, in as many rows."""
        names = [field.name for field in fields(Decoded) if field.name != "rows"]
        return Decoded(rows=parts[0].rows, **{name: sum(getattr(part, name) for part in parts) for name in names})

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """The share of experts that needed no read, not even one ahead. Of a single row: others share experts."""
        return 1 - (self.misses + self.good_guesses) / self.num_chosen

    @property
    def missed_bytes(self) -> float:
        """A token's bytes of experts that were chosen and not there: `read_bytes` without wrong guesses."""
        num_read = self.misses + self.guesses
        return self.read_bytes * (self.misses + self.good_guesses) / max(num_read, 1) / self.num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One process. `expert_slots` and what follows were planned, None where nothing streams, and `even_hit_rate` as if
    all experts were chosen equally often; `disk_rates` are bytes a second, read before and after decoding; `peak_bytes`
    is the most that the process had in memory."""

    expert_slots: int | None
    num_experts: int | None
    even_hit_rate: float | None
    hit_rate: float | None
    read_bytes: int | None
    seconds: float | None
    disk_rates: Sequence[float]
    peak_bytes: int
    decoded: Sequence[Decoded]

    @property
    def disk_rate(self) -> float:
        return statistics.median(self.disk_rates)


def run(turn: Turn) -> Report:
    draw = random.Random(f"streaming {turn.seed}")
    folder = Path(turn.folder)
    with ErnieModel.from_pretrained(
        folder,
        device="cpu",
        memory=turn.limit,
        context_tokens=_CONTEXT_TOKENS,
        max_batch=max(turn.rows),
        progress=False,
    ) as model:
        disk_rates = [_disk_rate(folder)]
        warm_up = _prompts(draw, 1, _WARM_UP_TOKENS)
        model.generate(warm_up[0], max_new_tokens=2, temperature=1.0, ignore_eos=True)
        with nullcontext() if turn.record_to is None else model.trace_routing() as recording:
            prompts, seed = _prompts(draw, turn.num_prompts, PROMPT_TOKENS), draw.randrange(2**31)
            decoded = {
                rows: Decoded.together(
                    [
                        _decode(model, prompts[first : first + rows], turn.new_tokens, seed + first)
                        for first in range(0, turn.num_prompts, rows)
                    ]
                )
                # Those that are run later find more experts in memory, so the order turns round.
                for rows in sorted(turn.rows, reverse=turn.seed % 2 == 1)
            }
        if recording is not None:
            recording.trace.save(str(turn.record_to))
        disk_rates.append(_disk_rate(folder))
        plan = _plan(turn)
        return Report(
            expert_slots=None if plan.expert_slots is None else plan.expert_slots.text,
            num_experts=None if plan.num_experts is None else plan.num_experts.text,
            even_hit_rate=model.plan.expert_hit_rate,
            hit_rate=plan.expert_hit_rate,
            read_bytes=plan.expert_read_bytes,
            seconds=None if plan.tokens_per_second is None else 1 / plan.tokens_per_second,
            disk_rates=disk_rates,
            peak_bytes=_peak_bytes(),
            decoded=[decoded[rows] for rows in turn.rows],
        )


def _plan(turn: Turn) -> MemoryPlan:
    """Of the model, by what was recorded where something was."""
    return plan_memory(
        turn.folder,
        device="cpu",
        memory=turn.limit,
        context_tokens=_CONTEXT_TOKENS,
        max_batch=max(turn.rows),
        routing=None if turn.planned_by is None else RoutingTrace.load(turn.planned_by),
    )


def _decode(model: ErnieModel, prompts: Sequence[Sequence[int]], num_new_tokens: int, seed: int) -> Decoded:
    """From when the last of the prompts has its first token until the first request ends."""
    # Prompts may be run in turns of their own, while those before them decode.
    num_new_tokens += len(prompts)

    async def follow(prompt: Sequence[int], seed: int) -> list[tuple[float, ExpertCounts]]:
        chunks = model.astream_generate(
            prompt, max_new_tokens=num_new_tokens, temperature=1.0, top_p=1.0, seed=seed, ignore_eos=True
        )
        return [
            (time.perf_counter(), model.stats.experts or ExpertCounts())
            async for chunk in chunks
            for _ in chunk.token_ids
        ]

    async def follow_all() -> list[list[tuple[float, ExpertCounts]]]:
        return list(await asyncio.gather(*(follow(prompt, seed + row) for row, prompt in enumerate(prompts))))

    followed = asyncio.run(follow_all())
    start, before = max((each[0] for each in followed), key=lambda reading: reading[0])
    end, after = min((each[-1] for each in followed), key=lambda reading: reading[0])
    num_tokens = sum(start < at <= end for each in followed for at, _ in each)
    experts = model.spec.experts
    num_layers = 0 if experts is None else sum(map(experts.in_layer, range(model.spec.num_layers)))
    return Decoded(
        rows=len(prompts),
        num_tokens=num_tokens,
        seconds=end - start,
        num_chosen=0 if experts is None else num_tokens * num_layers * experts.experts_per_token,
        misses=after.misses - before.misses,
        guesses=after.guesses - before.guesses,
        good_guesses=after.good_guesses - before.good_guesses,
        read_bytes=after.read_bytes - before.read_bytes,
        stall_seconds=after.stall_seconds - before.stall_seconds,
    )


def _prompts(draw: random.Random, num_prompts: int, num_tokens: int) -> list[list[int]]:
    return [draw.choices(range(_LOWEST_ID, _HIGHEST_ID), k=num_tokens) for _ in range(num_prompts)]


def _disk_rate(folder: Path) -> float:
    disk_rate.cache_clear()
    return disk_rate(folder)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    print(json.dumps(asdict(run(Turn(**json.loads(sys.argv[1]))))))


if __name__ == "__main__":
    main()
