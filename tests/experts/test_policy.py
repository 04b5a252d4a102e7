from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from ernie45.experts.policy import SimulatedCache, UsePolicy

EVERYTHING = np.arange(8)


class OldestFirst:
    """Least recently used."""

    def __init__(self, num_keys: int) -> None:
        self.last_use = np.zeros(num_keys)
        self.num_steps = 0

    def note(self, keys: NDArray[np.integer] | Sequence[int]) -> None:
        self.num_steps += 1
        self.last_use[keys] = self.num_steps

    def victim(self, candidates: NDArray[np.integer]) -> int:
        return int(candidates[self.last_use[candidates].argmin()])


def noted(*steps: list[int], num_keys: int = 8) -> UsePolicy:
    policy = UsePolicy(num_keys)
    for keys in steps:
        policy.note(keys)
    return policy


def test_what_was_never_used_goes_first() -> None:
    assert noted([0, 1, 3], [4, 5, 6, 7]).victim(EVERYTHING) == 2


def test_of_equally_recent_keys_the_one_used_less_goes() -> None:
    assert noted([0, 1], [4], [0, 1, 2], [4], [0, 1, 2]).victim(np.array([0, 1, 2])) == 2


def test_of_keys_used_as_often_the_older_goes() -> None:
    assert noted([3], [4], [1], [4], [2]).victim(np.array([1, 2, 3])) == 3


def test_only_candidates_are_evicted() -> None:
    policy = noted([0], [4], [1, 2])
    assert policy.victim(np.array([2, 1])) == 2
    assert policy.victim(np.array([1])) == 1


def test_a_use_counts_half_after_48_steps() -> None:
    """Key 0 was used twice long ago and key 1 once now."""
    for num_steps, victim in ((46, 1), (50, 0)):
        policy = noted([0, 7], [4], [0, 7], [4], *([7], [4]) * num_steps, [1, 7])
        assert policy.victim(np.array([0, 1])) == victim


def test_the_layers_of_a_step_are_of_one_time() -> None:
    policy = noted([0], [2], [4], [6], [0], [2], [4], [6])
    assert [policy.victim(np.array(keys)) for keys in ([2, 6], [6, 2])] == [2, 6]  # worth the same


def test_uses_of_what_is_not_resident_are_remembered() -> None:
    """Key 0 is used again and again but never fits: when it comes it is not the next to go."""
    policy = noted(*([0], [4]) * 5, [1], [4], [2])
    assert policy.victim(np.array([0, 1, 2])) == 1


def test_scores_stay_comparable_after_a_long_time() -> None:
    policy = noted([0, 1])
    for _ in range(100_000):
        policy.note([2, 3])
        policy.note([4])
    policy.note([1])
    assert policy.victim(np.array([0, 1])) == 0
    assert policy.victim(np.array([1, 2])) == 1


@pytest.mark.parametrize("num_slots", [6, 16, 48])
def test_it_finds_more_than_lru_where_topics_change(num_slots: int) -> None:
    steps = drifting_steps(num_layers=4, num_experts=16, num_chosen=2, num_tokens=1200)
    assert hits(steps, num_slots, UsePolicy(64)) > 1.01 * hits(steps, num_slots, OldestFirst(64))


def test_a_cache_finds_what_it_was_given_before_and_keeps_what_is_in_use() -> None:
    cache = SimulatedCache(UsePolicy(8), num_keys=8, num_slots=3)
    assert cache.use(np.array([0, 1])) == 0
    assert cache.use(np.array([1, 2])) == 1
    assert cache.use(np.array([1, 2, 3])) == 2  # 0 goes
    assert cache.use(np.array([0])) == 0  # 3 goes, used once
    assert cache.use(np.array([1, 2])) == 2
    assert cache.use(np.array([3, 4, 5])) == 0
    assert cache.use(np.array([3, 4, 5])) == 3


def hits(steps: list[NDArray[np.integer]], num_slots: int, policy: UsePolicy | OldestFirst) -> int:
    cache = SimulatedCache(policy, 64, num_slots)
    return sum(cache.use(keys) for keys in steps)


def drifting_steps(*, num_layers: int, num_experts: int, num_chosen: int, num_tokens: int) -> list[NDArray[np.integer]]:
    """Every 200 tokens each layer likes its experts in another order, by Zipf's law."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, num_experts + 1)
    steps: list[NDArray[np.integer]] = []
    for token in range(num_tokens):
        if token % 200 == 0:
            orders = [random.permutation(weights / weights.sum()) for _ in range(num_layers)]
        for layer, order in enumerate(orders):
            steps.append(layer * num_experts + random.choice(num_experts, num_chosen, replace=False, p=order))
    return steps
