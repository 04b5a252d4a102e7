"""The KV slots: which are free, what lies in each, and what a prompt takes over from there."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import final

from ernie45.backends.kv_cache import KVCache
from ernie45.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    """The tokens of a slot that others can take over: the first `num_tokens` of `token_ids`, with pictures where
    `placed` says."""

    token_ids: Tokens[int]
    placed: frozenset[tuple[int, bytes]]
    num_tokens: int

    def num_shared(self, sequence: Sequence) -> int:
        """With how many of these tokens the prompt of `sequence` begins."""
        shared = _num_alike(self.token_ids, sequence.token_ids, min(self.num_tokens, sequence.max_reused))
        # All pictures have the same ids. The marker before one is computed with it.
        return max(0, min((shared, *(first - 1 for first, _ in self.placed ^ sequence.placed))))


_NOTHING = _Content(token_ids=(), placed=frozenset(), num_tokens=0)


@final
class SlotPool:
    """Lends the `num_slots` slots of a KV cache to sequences.

    What lies in a slot stays there until the slot is lent again. A prompt that begins like it has these keys and values
    copied, or left in place, instead of computed: all of its tokens but the last, in multiples of `prefix_tokens` (see
    `PrefixBackend`); of none where that is None. Beside the ids nothing is kept for that, so the cache is its limit.
    """

    def __init__(self, cache: KVCache, *, num_slots: int, prefix_tokens: int | None) -> None:
        self._cache = cache
        self._prefix_tokens = prefix_tokens
        self._contents = [_NOTHING] * num_slots
        self._free = list(reversed(range(num_slots)))  # the one given back last is the last

    @property
    def num_free(self) -> int:
        return len(self._free)

    def lend(self, sequence: Sequence) -> None:
        """Give it the free slot whose whole content it begins with, else the one least worth keeping, and what any slot
        has of its prompt."""
        shared = self._num_shared(sequence)
        continued = [slot for slot in self._free if 0 < shared[slot] == self._contents[slot].num_tokens]
        slot = max(continued, key=shared.__getitem__) if continued else self._least_worth()
        self._free.remove(slot)
        sequence.slot = slot
        sequence.take_over(shared[slot])
        self.catch_up(sequence)

    def catch_up(self, sequence: Sequence) -> None:
        """Copy what another slot has by now of the tokens that come next in its prompt."""
        assert sequence.slot is not None
        shared = self._num_shared(sequence)
        num_tokens = max(shared)
        if num_tokens > sequence.num_cached:
            self._cache.copy_prefix(shared.index(num_tokens), sequence.slot, num_tokens, start=sequence.num_cached)
            sequence.take_over(num_tokens)
            self.note(sequence)

    def note(self, sequence: Sequence) -> None:
        """Remember what lies in its slot now; to be called whenever something was written there."""
        assert sequence.slot is not None
        if self._prefix_tokens is None:
            return
        num_tokens = sequence.num_cached
        if self._prefix_tokens > 1:
            num_tokens = min(num_tokens, sequence.num_prompt_tokens)
        self._contents[sequence.slot] = _Content(
            token_ids=sequence.token_ids, placed=sequence.placed, num_tokens=self._rounded(num_tokens)
        )

    def give_back(self, sequence: Sequence) -> None:
        """Its slot is free; what lies there stays."""
        assert sequence.slot is not None
        self.note(sequence)
        self._free.append(sequence.slot)
        sequence.slot = None

    def _least_worth(self) -> int:
        """Of the free slots one that holds nothing, the latest in use since its memory is there; else the one given
        back longest ago."""
        empty = [slot for slot in self._free if not self._contents[slot].num_tokens]
        return empty[-1] if empty else self._free[0]

    def _num_shared(self, sequence: Sequence) -> list[int]:
        """How many tokens each slot has of the prompt, from its beginning."""
        return [self._rounded(content.num_shared(sequence)) for content in self._contents]

    def _rounded(self, num_tokens: int) -> int:
        unit = self._prefix_tokens or 1
        return num_tokens // unit * unit


def _num_alike(a: Tokens[int], b: Tokens[int], limit: int) -> int:
    """With how many equal ids `a` and `b` begin, at most `limit`."""
    alike, unsure = 0, limit
    while alike < unsure:
        middle = (alike + unsure + 1) // 2
        if a[alike:middle] == b[alike:middle]:
            alike = middle
        else:
            unsure = middle - 1
    return alike
