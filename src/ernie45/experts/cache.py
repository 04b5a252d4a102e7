"""Which experts lie in memory, and the reading of those that do not."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar, final

import numpy as np

from ernie45.experts.policy import UsePolicy
from ernie45.types.stats import ExpertCounts

Expert = TypeVar("Expert")

Fill = Callable[[int, int], Expert]
"""Reads an expert, by its key, into the memory of a slot, by its number: on one of the cache's threads."""


@final
class ExpertCache(Generic[Expert]):
    """`num_slots` of `num_keys` experts, each of `expert_bytes` in the files, read by `num_readers` threads.

    One thread only calls `lease`; it needs no locks, for the others do nothing but fill slots that are theirs. There is
    never more in memory than the slots. An expert that could not be read is as if it had never been asked for.
    """

    def __init__(
        self, *, num_keys: int, num_slots: int, num_readers: int, expert_bytes: int, fill: Fill[Expert]
    ) -> None:
        self.num_slots = num_slots
        self._fill, self._expert_bytes = fill, expert_bytes
        self._policy = UsePolicy(num_keys)
        self._free = list(range(num_slots))
        self._slots: dict[int, int] = {}
        self._filled: dict[int, Future[Expert]] = {}
        self._ahead: set[int] = set()  # guesses that are being read, or were
        self._unproven: set[int] = set()  # guesses in memory that no lease has wanted yet
        self._can_go = np.zeros(num_keys, dtype=bool)
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="ernie45-experts")
        self._hits = self._misses = self._guesses = self._good_guesses = 0
        self._stall_seconds = 0.0

    @property
    def counts(self) -> ExpertCounts:
        """Of everything that was leased so far."""
        return ExpertCounts(
            hits=self._hits,
            misses=self._misses,
            guesses=self._guesses,
            good_guesses=self._good_guesses,
            read_bytes=(self._misses + self._guesses) * self._expert_bytes,
            stall_seconds=self._stall_seconds,
        )

    def lease(
        self, keys: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Generator[Sequence[tuple[int, Expert]], None, None]:
        """The experts of these keys, in groups as they arrive. Those of a group stay until the next is asked for. Any
        number of keys will do, however few slots there are. To be closed before the next lease.

        What there is to do `meanwhile` is done once as many are being read as have room, before any is waited for.

        Raises what `fill` raises.
        """
        self._policy.note(keys)
        proven = self._unproven.intersection(keys)
        self._unproven -= proven
        self._good_guesses += len(proven)
        num_asked, waiting = 0, list[int]()
        try:
            while num_asked < len(keys) or waiting:
                while num_asked < len(keys) and self._ask(keys[num_asked], keys[num_asked + 1 :]):
                    waiting.append(keys[num_asked])
                    num_asked += 1
                if meanwhile is not None:
                    meanwhile()
                    meanwhile = None
                here = [key for key in waiting if self._filled[key].done()]
                if not here:  # nor is any to come, where every slot is being filled ahead
                    started = time.perf_counter()
                    wait([self._filled[key] for key in waiting or self._ahead], return_when=FIRST_COMPLETED)
                    self._stall_seconds += time.perf_counter() - started
                    continue
                yield [(key, self._filled[key].result()) for key in here]
                for key in here:
                    self._can_go[key] = True
                waiting = [key for key in waiting if key not in here]
        finally:
            self._release(waiting)

    def read_ahead(self, keys: Sequence[int], most: int) -> None:
        """Have up to `most` of these experts read that are not there, the likeliest first: guesses of what is next.
        None of them makes room for another."""
        for key in keys:
            if most and key not in self._filled:
                slot = self._take_slot(keys)
                if slot is None:
                    return
                self._read(key, slot)
                self._ahead.add(key)
                self._unproven.add(key)
                self._guesses += 1
                most -= 1

    def close(self) -> None:
        """Wait for what is being read, and let go of the experts, their memory and the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._filled.clear()
        del self._fill

    def _ask(self, key: int, later: Sequence[int]) -> bool:
        """Have an expert read unless it is there already, and keep it; False if there is no slot for it now. Those that
        come `later` go before it only where nothing else can."""
        if key in self._ahead:
            self._ahead.remove(key)
            if self._filled[key].done():
                self._release([key])  # one that failed, perhaps long ago, is read again
        if key in self._filled:
            self._hits += self._filled[key].done()
        else:
            slot = self._take_slot(later)
            if slot is None:
                slot = next((self._drop(key) for key in reversed(later) if self._can_go[key]), None)
            if slot is None:
                return False
            self._read(key, slot)
            self._misses += 1
        self._can_go[key] = False
        return True

    def _read(self, key: int, slot: int) -> None:
        try:
            self._filled[key] = self._readers.submit(self._fill, key, slot)
        except RuntimeError:  # the system has no more threads
            self._free.append(slot)
            raise
        self._slots[key] = slot

    def _take_slot(self, spared: Sequence[int]) -> int | None:
        """One that is free, or that of an expert which is not in use and not spared; None if there is none now."""
        for key in [key for key in self._ahead if self._filled[key].done()]:  # guesses that were wrong so far may go
            self._ahead.remove(key)
            self._release([key])
        if self._free:
            return self._free.pop()
        can_go = self._can_go.copy()
        can_go[list(spared)] = False
        candidates = np.flatnonzero(can_go)
        return self._drop(self._policy.victim(candidates)) if len(candidates) else None

    def _drop(self, key: int) -> int:
        del self._filled[key]
        self._unproven.discard(key)
        self._can_go[key] = False
        return self._slots.pop(key)

    def _release(self, keys: Sequence[int]) -> None:
        """Those that were asked for and not used, after a failure: whatever was read stays."""
        wait([self._filled[key] for key in keys])
        for key in keys:
            if self._filled[key].exception() is None:
                self._can_go[key] = True
            else:
                self._free.append(self._drop(key))
