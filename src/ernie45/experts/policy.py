"""Which expert makes room for another (docs/decisions/0024-expert-cache.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, final

import numpy as np
from numpy.typing import NDArray

_HALF_LIFE_STEPS: Final = 48


class Policy(Protocol):
    """Keys are the experts of the first layer, then those of the next, and so on: 0 … `num_keys` - 1."""

    def note(self, keys: NDArray[np.integer] | Sequence[int]) -> None:
        """A step uses these keys of a layer, at least one and each named once; the layers of a step come in order."""
        ...

    def victim(self, candidates: NDArray[np.integer]) -> int:
        """Which of these keys, which are resident and not in use, to evict."""
        ...


@final
class UsePolicy:
    """Evicts the key that was used least, where a use counts half after 48 steps: LRFU (Lee et al. 2001).

    Uses are remembered of keys that are not resident as well. Not for several threads at once.
    """

    __slots__ = ("_clock", "_last_key", "_scores")

    def __init__(self, num_keys: int) -> None:
        # log2 of the sum of 2 ** clock over the uses: as the clock only grows, keys that are not used keep their score
        self._scores = np.full(num_keys, -np.inf)
        self._clock = 0.0  # in half-lives
        self._last_key = -1

    def note(self, keys: NDArray[np.integer] | Sequence[int]) -> None:
        if keys[0] < self._last_key:  # back at an earlier layer: this is the next step
            self._clock += 1 / _HALF_LIFE_STEPS
        self._last_key = int(keys[0])
        self._scores[keys] = np.logaddexp2(self._scores[keys], self._clock)

    def victim(self, candidates: NDArray[np.integer]) -> int:
        """As said of `Policy`; the first of several that are worth the same."""
        return int(candidates[self._scores[candidates].argmin()])


@final
class SimulatedCache:
    """What a cache of `num_slots` experts would hold, without the experts."""

    def __init__(self, policy: Policy, num_keys: int, num_slots: int) -> None:
        self._policy = policy
        self._resident = np.zeros(num_keys, dtype=bool)
        self._num_free = num_slots

    def use(self, keys: NDArray[np.integer]) -> int:
        """Have a layer's step use these keys, each named once and no more than slots -> how many were resident."""
        hits = int(self._resident[keys].sum())
        self._policy.note(keys)
        self._resident[keys] = False  # in use, and so no candidates
        self._num_free -= len(keys) - hits
        if self._num_free < 0:
            candidates = np.flatnonzero(self._resident)
            for _ in range(-self._num_free):
                victim = self._policy.victim(candidates)
                self._resident[victim] = False
                candidates = candidates[candidates != victim]
            self._num_free = 0
        self._resident[keys] = True
        return hits
