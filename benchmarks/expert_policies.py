"""Which experts to keep in memory: how many of those used each policy finds there, by trace and size of the cache.

python -m benchmarks.expert_policies [--shape 21b] [--rows 1] [--tokens 1000] [--trace FILE.npz ...]
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ernie45.experts.policy import Policy, SimulatedCache, UsePolicy
from ernie45.experts.trace import RoutingTrace

Keys = NDArray[np.integer]

CACHE_SHARES = (0.10, 0.25, 0.40, 0.60)
HALF_LIVES = (12, 24, 96, 192)  # in steps; that of UsePolicy is 48
NOT_COUNTED = 0.2  # of a drawn trace, while the cache fills
TOPIC_TOKENS = 300
RETURNING = 0.5  # of the changes of topic, those that go back to an earlier one
REPEATED = 0.3  # of an expert's chances, those that stay what they were for the token before


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    num_layers: int
    num_experts: int
    experts_per_token: int


SHAPES = {
    "21b": Shape(num_layers=27, num_experts=64, experts_per_token=6),
    "300b": Shape(num_layers=51, num_experts=64, experts_per_token=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """What each layer of each step uses, in order, and whether it counts; the smallest cache holds `min_slots`."""

    num_keys: int
    min_slots: int
    uses: Sequence[tuple[Keys, bool]]

    def for_cache(self, num_slots: int) -> Trace:
        """With steps that use more than there are slots, as those of prompts, in pieces."""
        pieces = [
            (keys[first : first + num_slots], counts)
            for keys, counts in self.uses
            for first in range(0, len(keys), num_slots)
        ]
        return Trace(num_keys=self.num_keys, min_slots=self.min_slots, uses=pieces)


class Lru:
    """Evicts what was used the longest ago."""

    def __init__(self, num_keys: int) -> None:
        self.scores = np.zeros(num_keys)
        self.num_steps = 0

    def note(self, keys: Keys | Sequence[int]) -> None:
        self.num_steps += 1
        self.scores[keys] = self.num_steps

    def victim(self, candidates: Keys) -> int:
        return int(candidates[self.scores[candidates].argmin()])


class Lfu(Lru):
    """Evicts what was used least often since the beginning."""

    def note(self, keys: Keys | Sequence[int]) -> None:
        self.scores[keys] += 1


class Lrfu(Lru):
    """As `UsePolicy`, with any half-life."""

    def __init__(self, num_keys: int, half_life: int) -> None:
        self.scores = np.full(num_keys, -np.inf)
        self.clock, self.last_key, self.half_life = 0.0, -1, half_life

    def note(self, keys: Keys | Sequence[int]) -> None:
        self.clock += (keys[0] < self.last_key) / self.half_life
        self.last_key = int(keys[0])
        self.scores[keys] = np.logaddexp2(self.scores[keys], self.clock)


class Belady(Lru):
    """Evicts what will be used the latest: no policy finds more."""

    def __init__(self, trace: Trace) -> None:
        self.scores = np.full(trace.num_keys, -np.inf)  # less the later the next use
        self.coming: deque[NDArray[np.float64]] = deque()
        for number in range(len(trace.uses) - 1, -1, -1):
            keys = trace.uses[number][0]
            self.coming.appendleft(self.scores[keys])
            self.scores[keys] = -number

    def note(self, keys: Keys | Sequence[int]) -> None:
        self.scores[keys] = self.coming.popleft()


class Slru:
    """Segmented LRU: what was used again moves to a protected segment, 4/5 of the cache."""

    def __init__(self, num_slots: int) -> None:
        self.fresh: OrderedDict[int, None] = OrderedDict()
        self.protected: OrderedDict[int, None] = OrderedDict()
        self.num_protected = num_slots * 4 // 5
        self.in_use: frozenset[int] = frozenset()

    def note(self, keys: Keys | Sequence[int]) -> None:
        numbers = [int(key) for key in keys]
        self.in_use = frozenset(numbers)
        for key in numbers:
            if key not in self.fresh and key not in self.protected:
                self.fresh[key] = None
                continue
            self.fresh.pop(key, None)
            self.protected[key] = None
            self.protected.move_to_end(key)
            if len(self.protected) > self.num_protected:
                self.fresh[self.protected.popitem(last=False)[0]] = None

    def victim(self, candidates: Keys) -> int:
        for segment in (self.fresh, self.protected):
            for key in segment:
                if key not in self.in_use:
                    del segment[key]
                    return key
        raise AssertionError("no candidate")


class S3Fifo:
    """S3-FIFO (Yang et al. 2023): a small queue for what is new, a main one, and a memory of what was evicted."""

    def __init__(self, num_slots: int) -> None:
        self.small: OrderedDict[int, None] = OrderedDict()
        self.main: OrderedDict[int, None] = OrderedDict()
        self.evicted: OrderedDict[int, None] = OrderedDict()
        self.uses: dict[int, int] = {}
        self.num_small, self.num_main = max(1, num_slots // 10), num_slots - max(1, num_slots // 10)
        self.in_use: frozenset[int] = frozenset()

    def note(self, keys: Keys | Sequence[int]) -> None:
        numbers = [int(key) for key in keys]
        self.in_use = frozenset(numbers)
        for key in numbers:
            if key in self.uses:
                self.uses[key] = min(3, self.uses[key] + 1)
                continue
            self.uses[key] = 0
            (self.main if key in self.evicted else self.small)[key] = None
            self.evicted.pop(key, None)

    def victim(self, candidates: Keys) -> int:
        if len(self.small) >= self.num_small:
            for key in [key for key in self.small if key not in self.in_use]:
                del self.small[key]
                if self.uses[key] <= 1:
                    self.evicted[key] = None
                    if len(self.evicted) > self.num_main:
                        self.evicted.popitem(last=False)
                    return self.forget(key)
                self.main[key] = None
        while True:
            key = next(key for key in (*self.main, *self.small) if key not in self.in_use)
            if key in self.main and self.uses[key]:
                self.uses[key] -= 1
                self.main.move_to_end(key)
            else:
                (self.main if key in self.main else self.small).pop(key)
                return self.forget(key)

    def forget(self, key: int) -> int:
        del self.uses[key]
        return key


def policies(trace: Trace, num_slots: int) -> Mapping[str, Policy]:
    return {
        "LRU": Lru(trace.num_keys),
        "LFU": Lfu(trace.num_keys),
        "SLRU": Slru(num_slots),
        "S3-FIFO": S3Fifo(num_slots),
        **{f"LRFU {half_life}": Lrfu(trace.num_keys, half_life) for half_life in HALF_LIVES},
        "UsePolicy": UsePolicy(trace.num_keys),
        "Belady": Belady(trace),
    }


def hit_rate(trace: Trace, num_slots: int, policy: Policy) -> float:
    cache = SimulatedCache(policy, trace.num_keys, num_slots)
    hits = uses = 0
    for keys, counts in trace.uses:
        found = cache.use(keys)
        if counts:
            hits, uses = hits + found, uses + len(keys)
    return hits / uses


class Popularity:
    """log-probabilities of the experts of every layer [layers, E], in a random order for each, by Zipf's law."""

    def __init__(self, shape: Shape, exponent: float, seed: int) -> None:
        self.shape, self.random = shape, np.random.default_rng(seed)
        self.by_rank = -exponent * np.log(np.arange(1, shape.num_experts + 1))

    def draw(self) -> NDArray[np.float64]:
        return np.stack([self.random.permutation(self.by_rank) for _ in range(self.shape.num_layers)])

    def stays(self) -> Iterator[NDArray[np.float64]]:
        """The same for every token."""
        popularity = self.draw()
        while True:
            yield popularity

    def drifts(self) -> Iterator[NDArray[np.float64]]:
        """Another with every topic."""
        topics: list[NDArray[np.float64]] = []
        while True:
            if topics and self.random.random() < RETURNING:
                topic = topics[int(self.random.integers(len(topics)))]
            else:
                topic = self.draw()
                topics.append(topic)
            for _ in range(int(self.random.integers(TOPIC_TOKENS // 2, TOPIC_TOKENS * 3 // 2))):
                yield topic


def drawn(shape: Shape, rows: Sequence[Iterator[NDArray[np.float64]]], num_steps: int, repeated: float = 0) -> Trace:
    """K experts a token and layer without replacement, by the popularity of each row's next token."""
    random = np.random.default_rng(0)
    first_keys = np.arange(shape.num_layers)[:, None] * shape.num_experts
    size = len(rows), shape.num_layers, shape.num_experts
    noise = random.gumbel(size=size)
    uses = []
    for step in range(num_steps):
        noise = np.where(random.random(size) < repeated, noise, random.gumbel(size=size))
        chances = np.stack([next(row) for row in rows]) + noise
        chosen = np.argpartition(-chances, shape.experts_per_token, axis=2)[:, :, : shape.experts_per_token]
        for keys in (chosen + first_keys).transpose(1, 0, 2):
            uses.append((np.unique(keys), step >= num_steps * NOT_COUNTED))
    num_keys = shape.num_layers * shape.num_experts
    return Trace(num_keys=num_keys, min_slots=len(rows) * shape.experts_per_token, uses=uses)


def drawn_traces(shape: Shape, num_rows: int, num_steps: int) -> Iterator[tuple[str, Trace]]:
    def alike(exponent: float) -> list[Iterator[NDArray[np.float64]]]:
        return [Popularity(shape, exponent, 0).stays() for _ in range(num_rows)]

    yield "uniform", drawn(shape, alike(0), num_steps)
    for exponent in (0.5, 0.8, 1.0, 1.2):
        yield f"Zipf {exponent}", drawn(shape, alike(exponent), num_steps)
    yield "Zipf 0.8, repeats", drawn(shape, alike(0.8), num_steps, REPEATED)
    topics = [Popularity(shape, 1.0, row).drifts() for row in range(num_rows)]
    yield "drift", drawn(shape, topics, num_steps)


def recorded(path: Path) -> Trace:
    """A trace of `RoutingTrace.save`, counted as `RoutingTrace.replay` does."""
    trace = RoutingTrace.load(path)
    uses = [(keys, num_tokens <= 16) for keys, num_tokens in trace.uses()]
    return Trace(num_keys=len(trace.layers) * trace.num_experts, min_slots=trace.chosen.shape[1], uses=uses)


def print_rates(name: str, trace: Trace) -> None:
    for share in CACHE_SHARES:
        num_slots = max(trace.min_slots, round(trace.num_keys * share))
        fitting = trace.for_cache(num_slots)
        rates = [hit_rate(fitting, num_slots, policy) for policy in policies(fitting, num_slots).values()]
        print(f"| {name} | {share:.0%} | " + " | ".join(f"{100 * rate:.1f}" for rate in rates) + " |", flush=True)


def print_cost(num_keys: int) -> None:
    policy = UsePolicy(num_keys)
    candidates, random = np.arange(num_keys * 6 // 10), np.random.default_rng(0)
    steps = [random.choice(num_keys, 6, replace=False) for _ in range(5000)]
    started = time.perf_counter()
    for keys in steps:
        policy.note(keys)
    noted = time.perf_counter()
    for _ in steps:
        policy.victim(candidates)
    ended = time.perf_counter()
    microseconds = [seconds / len(steps) * 1e6 for seconds in (noted - started, ended - noted)]
    print(f"\nUsePolicy: note {microseconds[0]:.1f} µs, victim of {len(candidates):,} {microseconds[1]:.1f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="21b", help="of the drawn traces")
    parser.add_argument("--rows", type=int, default=1, help="requests that are decoded together in the drawn traces")
    parser.add_argument("--tokens", type=int, default=1000, help="of each row of the drawn traces; 0: draw none")
    parser.add_argument("--trace", nargs="*", type=Path, default=[], help="files of RoutingTrace.save")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    example = Trace(num_keys=1, min_slots=1, uses=[])
    names = list(policies(example, 1))
    print(f"Hits in % of the experts used; {arguments.shape}, {arguments.rows} at once\n")
    print("| trace | cache | " + " | ".join(names) + " |")
    print("| --- | ---: |" + " ---: |" * len(names))
    if arguments.tokens:
        for name, trace in drawn_traces(shape, arguments.rows, arguments.tokens):
            print_rates(name, trace)
    for path in arguments.trace:
        print_rates(path.stem, recorded(path))
    print_cost(shape.num_layers * shape.num_experts)


if __name__ == "__main__":
    main()
