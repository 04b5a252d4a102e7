"""The expert cache under threads: every lease brings all its experts, no slot holds two, failures leave no trace."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest

from ernie45.experts.cache import ExpertCache

BYTES = 100


class BadDiskError(Exception):
    """What a fill raises."""


@dataclass(kw_only=True)
class Slots:
    """Memory that experts are filled into: the number of the expert that lies in each slot. Notes what no cache may do.

    `wrong` experts raise. Fills of `held` ones wait until they are taken out of there.
    """

    num_slots: int
    sleeps: random.Random | None = None
    content: dict[int, int | None] = field(default_factory=dict)
    filled: list[int] = field(default_factory=list)
    wrong: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    in_use: set[int] = field(default_factory=set)
    mistakes: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def fill(self, key: int, slot: int) -> tuple[int, int]:
        with self.changed:
            if not 0 <= slot < self.num_slots:
                self.mistakes.append(f"there is no slot {slot}")
            if slot in self.in_use:
                self.mistakes.append(f"slot {slot} is overwritten with {key} while it is leased or filled")
            self.in_use.add(slot)
            self.content[slot] = None
            self.filled.append(key)
            seconds = 0.0 if self.sleeps is None else self.sleeps.choice([0, 0, 1e-4, 1e-3])
        time.sleep(seconds)
        with self.changed:
            self.changed.wait_for(lambda: key not in self.held, timeout=10)
            self.in_use.discard(slot)
            if key in self.wrong:
                raise BadDiskError(f"expert {key}")
            self.content[slot] = key
            return key, slot

    def let_go(self, *keys: int) -> None:
        with self.changed:
            self.held.difference_update(keys)
            self.changed.notify_all()

    @contextmanager
    def leased(self, group: Sequence[tuple[int, tuple[int, int]]]) -> Iterator[None]:
        """Nothing may be written to the slots of a group."""
        slots = {slot for _, (_, slot) in group}
        with self.changed:
            self.in_use |= slots
            for key, (filled, slot) in group:
                if key != filled or self.content[slot] != key:
                    self.mistakes.append(f"slot {slot} has {self.content[slot]} instead of {key}")
        yield
        with self.changed:
            for key, (_, slot) in group:
                if self.content[slot] != key:
                    self.mistakes.append(f"{key} in slot {slot} became {self.content[slot]} while it was leased")
            self.in_use -= slots


@contextmanager
def opened(slots: Slots, num_keys: int = 8, num_readers: int = 3) -> Iterator[ExpertCache[tuple[int, int]]]:
    cache = ExpertCache(
        num_keys=num_keys, num_slots=slots.num_slots, num_readers=num_readers, expert_bytes=BYTES, fill=slots.fill
    )
    yield cache
    slots.let_go(*slots.held)
    cache.close()
    assert slots.mistakes == []


def use(cache: ExpertCache[tuple[int, int]], slots: Slots, keys: Sequence[int]) -> list[int]:
    """The keys that a lease brought, sorted."""
    brought = []
    with closing(cache.lease(keys)) as groups:
        for group in groups:
            with slots.leased(group):
                brought += [key for key, _ in group]
    return sorted(brought)


def settle(cache: ExpertCache[tuple[int, int]]) -> None:
    """Wait until nothing is being read."""
    wait(cache._filled.values())


def numbers(cache: ExpertCache[tuple[int, int]]) -> tuple[int, int, int, int]:
    counts = cache.counts
    assert counts.read_bytes == (counts.misses + counts.guesses) * BYTES
    return counts.hits, counts.misses, counts.guesses, counts.good_guesses


@pytest.mark.parametrize("num_slots", range(1, 9))
def test_a_lease_brings_each_key_once_however_few_slots_there_are(num_slots: int) -> None:
    slots = Slots(num_slots=num_slots)
    with opened(slots) as cache:
        for keys in ([0, 1, 2, 3, 4, 5, 6, 7], [5], [0, 2, 4, 6], [1, 3, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]):
            assert use(cache, slots, keys) == keys
        assert len(slots.content) == min(num_slots, 8)


def test_what_lies_in_memory_is_not_read_again() -> None:
    slots = Slots(num_slots=4)
    with opened(slots) as cache:
        use(cache, slots, [0, 1, 2])
        assert numbers(cache) == (0, 3, 0, 0)
        use(cache, slots, [0, 2, 5])
        assert numbers(cache) == (2, 4, 0, 0)
        assert sorted(slots.filled) == [0, 1, 2, 5]
        use(cache, slots, [1, 6])  # one of those that were used once makes room
        assert numbers(cache) == (3, 5, 0, 0)
        use(cache, slots, [0, 2])
        assert numbers(cache) == (5, 5, 0, 0)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_they_come_as_they_are_read(last: int) -> None:
    slots = Slots(num_slots=3, held={last})
    with opened(slots) as cache, closing(cache.lease([0, 1, 2])) as groups:
        brought: list[int] = []
        while len(brought) < 2:
            brought += [key for key, _ in next(groups)]
        assert sorted(brought) == sorted({0, 1, 2} - {last})
        slots.let_go(last)
        assert [key for key, _ in next(groups)] == [last]
        assert list(groups) == []
        assert cache.counts.stall_seconds > 0


def test_those_that_are_there_come_before_those_that_must_be_read() -> None:
    slots = Slots(num_slots=5)
    with opened(slots) as cache:
        use(cache, slots, [1, 4, 6])
        slots.held = {0, 5}
        with closing(cache.lease([0, 1, 4, 5, 6])) as groups:
            with slots.leased(group := next(groups)):
                assert [key for key, _ in group] == [1, 4, 6]
            slots.let_go(5)
            assert [key for key, _ in next(groups)] == [5]
            slots.let_go(0)
            assert [key for key, _ in next(groups)] == [0]


def test_while_one_is_read_others_use_the_slots_that_are_left() -> None:
    slots = Slots(num_slots=2, held={0})
    with opened(slots) as cache, closing(cache.lease([0, 1, 2, 3])) as groups:
        assert [[key for key, _ in next(groups)] for _ in range(3)] == [[1], [2], [3]]
        slots.let_go(0)
        assert [key for group in groups for key, _ in group] == [0]


def test_a_group_stays_until_the_next_is_asked_for() -> None:
    slots = Slots(num_slots=2)
    with opened(slots) as cache:
        groups = cache.lease([0, 1, 2, 3])
        group = next(groups)
        settle(cache)
        time.sleep(0.02)  # for what must not happen
        with slots.leased(group):
            pass
        assert set(slots.filled) == {0, 1}
        rest = [key for group in groups for key, _ in group]
        assert sorted([key for key, _ in group] + rest) == [0, 1, 2, 3]


def test_what_is_to_be_done_meanwhile_is_done_once_and_beside_the_reads() -> None:
    slots, calls = Slots(num_slots=2, held={0, 1}), []

    def meanwhile() -> None:
        calls.append(set(slots.filled))
        slots.let_go(0, 1)

    with opened(slots) as cache, closing(cache.lease([0, 1, 2, 3], meanwhile)) as groups:
        assert sorted(key for group in groups for key, _ in group) == [0, 1, 2, 3]
        assert len(calls) == 1
        assert calls[0] <= {0, 1}


def test_a_lease_that_is_left_half_way_keeps_nothing() -> None:
    slots = Slots(num_slots=3)
    with opened(slots) as cache:
        for _ in range(20):
            groups = cache.lease([0, 1, 2, 3, 4])
            next(groups)
            groups.close()
            assert use(cache, slots, [5, 6, 7]) == [5, 6, 7]
    with opened(slots) as cache:
        cache.lease([0, 1]).close()  # never begun
        assert use(cache, slots, [2, 3, 4]) == [2, 3, 4]


def test_what_fails_meanwhile_ends_the_lease() -> None:
    slots = Slots(num_slots=3)

    def meanwhile() -> None:
        raise BadDiskError("meanwhile")

    with opened(slots) as cache:
        with pytest.raises(BadDiskError, match="meanwhile"):
            next(cache.lease([0, 1, 2], meanwhile))
        assert use(cache, slots, [3, 4, 5]) == [3, 4, 5]


# Failures


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_a_failed_fill_is_raised_and_read_again_the_next_time(num_slots: int) -> None:
    slots = Slots(num_slots=num_slots, wrong={3})
    with opened(slots) as cache:
        for _ in range(5):
            with pytest.raises(BadDiskError, match="expert 3"):
                use(cache, slots, [1, 2, 3, 4])
        slots.wrong.clear()
        assert use(cache, slots, [1, 2, 3, 4]) == [1, 2, 3, 4]
        assert use(cache, slots, [0, 5, 6, 7]) == [0, 5, 6, 7]
        assert len(slots.content) == num_slots


def test_those_beside_a_failure_stay_in_memory() -> None:
    slots = Slots(num_slots=4, wrong={0})
    with opened(slots) as cache:
        with pytest.raises(BadDiskError):
            use(cache, slots, [0, 1, 2, 3])
        assert use(cache, slots, [1, 2, 3]) == [1, 2, 3]
        assert numbers(cache) == (3, 4, 0, 0)
        assert sorted(slots.filled) == [0, 1, 2, 3]


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_guess_that_failed_long_ago_is_read_again(looked_at: bool) -> None:
    slots = Slots(num_slots=4, wrong={5})
    with opened(slots) as cache:
        cache.read_ahead([5], 1)
        settle(cache)
        slots.wrong.clear()
        if looked_at:
            use(cache, slots, [0, 1])
        assert use(cache, slots, [2, 5]) == [2, 5]
        assert slots.filled.count(5) == 2
        assert use(cache, slots, [0, 1, 3, 4]) == [0, 1, 3, 4]
        assert len(slots.content) == 4


def test_a_guess_that_fails_and_is_not_wanted_is_no_error() -> None:
    slots = Slots(num_slots=2, wrong={6, 7})
    with opened(slots) as cache:
        cache.read_ahead([6, 7], 2)
        assert use(cache, slots, [0, 1, 2]) == [0, 1, 2]
        assert numbers(cache) == (0, 3, 2, 0)


# Guesses


def test_guesses_are_counted_as_good_once_they_are_used() -> None:
    slots = Slots(num_slots=4)
    with opened(slots) as cache:
        cache.read_ahead([4, 5, 6], 2)
        settle(cache)
        assert sorted(slots.filled) == [4, 5]
        use(cache, slots, [3, 4, 6])  # a miss comes before the guess that was right
        assert numbers(cache) == (1, 2, 2, 1)
        use(cache, slots, [4])
        assert numbers(cache) == (2, 2, 2, 1)
        use(cache, slots, [5])
        assert numbers(cache) == (3, 2, 2, 2)
        cache.read_ahead([3, 4, 5, 6], 4)  # all there
        assert numbers(cache) == (3, 2, 2, 2)


def test_a_guess_that_is_still_being_read_is_waited_for() -> None:
    slots = Slots(num_slots=3, held={4})
    with opened(slots) as cache:
        cache.read_ahead([4], 1)
        with closing(cache.lease([4, 5], lambda: slots.let_go(4))) as groups:
            assert sorted(key for group in groups for key, _ in group) == [4, 5]
        assert numbers(cache) == (0, 1, 1, 1)
        assert sorted(slots.filled) == [4, 5]


def test_a_guess_does_not_make_room_for_another() -> None:
    slots = Slots(num_slots=2)
    with opened(slots) as cache:
        for guesses in ([0, 1, 2, 3], [2, 0, 1, 3]):
            for _ in range(3):
                cache.read_ahead(guesses, 4)
                settle(cache)
        assert sorted(slots.filled) == [0, 1]
        cache.read_ahead([2, 3], 2)
        settle(cache)
        assert sorted(slots.filled) == [0, 1, 2, 3]
        assert use(cache, slots, [2, 3]) == [2, 3]
        assert numbers(cache) == (2, 0, 4, 2)


def test_what_is_leased_makes_no_room_for_guesses() -> None:
    slots = Slots(num_slots=3)
    with opened(slots) as cache, closing(cache.lease([0, 1, 2], lambda: cache.read_ahead([5, 6], 2))) as groups:
        assert sorted(key for group in groups for key, _ in group) == [0, 1, 2]
        assert cache.counts.guesses == 0


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_lease_begins_while_every_slot_is_filled_ahead(num_slots: int) -> None:
    slots = Slots(num_slots=num_slots, held={6, 7})
    with opened(slots) as cache:
        cache.read_ahead([6, 7], num_slots)
        threading.Timer(0.05, slots.let_go, (6, 7)).start()
        assert use(cache, slots, [0, 1, 2]) == [0, 1, 2]
        assert numbers(cache) == (0, 3, num_slots, 0)
        assert cache.counts.stall_seconds > 0.02


@pytest.mark.parametrize("num_slots", [1, 2])
def test_the_last_of_a_lease_goes_where_nothing_else_can(num_slots: int) -> None:
    slots = Slots(num_slots=num_slots)
    with opened(slots) as cache:
        use(cache, slots, [7])
        cache.read_ahead([6], num_slots - 1)
        settle(cache)
        assert use(cache, slots, [5, 6, 7]) == [5, 6, 7]


# Many at once, and the end


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 20])
def test_thousands_of_leases(num_slots: int) -> None:
    draw = random.Random(num_slots)
    slots = Slots(num_slots=num_slots, sleeps=random.Random(0))
    num_read = 0
    with opened(slots, num_keys=24) as cache:
        for _ in range(400):
            keys = sorted(draw.sample(range(24), draw.randint(1, 8)))
            guesses = draw.sample(range(24), 4)
            slots.wrong = {draw.randrange(24)} if draw.random() < 0.2 else set()
            leave_at = draw.choice([None, None, None, 1])
            brought: list[int] = []
            try:
                with closing(cache.lease(keys, partial(cache.read_ahead, guesses, 2))) as groups:
                    for group in groups:
                        with slots.leased(group):
                            brought += [key for key, _ in group]
                        if leave_at is not None and len(brought) >= leave_at:
                            break
                    else:
                        assert sorted(brought) == keys
            except BadDiskError:
                pass
            assert len(set(brought)) == len(brought)
            assert set(brought) <= set(keys)
            num_read += len(brought)
        settle(cache)
        assert num_read > 1000
        assert cache.counts.misses + cache.counts.guesses == len(slots.filled)


def test_closing_waits_for_reads_and_ends_the_threads() -> None:
    slots = Slots(num_slots=4, held={0})
    before = set(threading.enumerate())
    cache = ExpertCache(num_keys=8, num_slots=4, num_readers=1, expert_bytes=BYTES, fill=slots.fill)
    cache.read_ahead([0, 1, 2, 3], 4)
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started] == ["ernie45-experts_0"]
    threading.Timer(0.05, slots.let_go, (0,)).start()
    cache.close()
    assert not any(thread.is_alive() for thread in started)
    assert slots.filled == [0]
    kept = weakref.ref(slots)
    del slots
    gc.collect()
    assert kept() is None, "the memory is given back, though the counts are kept"
    assert numbers(cache) == (0, 0, 4, 0)
