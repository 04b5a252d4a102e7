"""Which prompts a turn of the engine works on."""

from __future__ import annotations

from collections.abc import Sequence as Prompts
from typing import final

from ernie45.engine.sequence import Sequence


@final
class PrefillSchedule:
    """The order in which turns serve prompts. A turn computes at most as many prompt tokens as a whole chunk has, or
    encodes one picture or part of a clip.

    Every second turn begins with the oldest prompt, and all of them go on with those that have the fewest tokens left.
    So a prompt shorter than the others is served in the second turn after it came, at the latest; and of one that is
    older than all others a chunk is run in every second turn, however many short ones come.
    """

    def __init__(self) -> None:
        self._oldest_first = False

    def order(self, prompts: Prompts[Sequence]) -> list[Sequence]:
        """The `prompts`, oldest first, in the order of the next turn."""
        shortest_first = sorted(prompts, key=lambda sequence: sequence.num_prompt_tokens - sequence.num_cached)
        if not prompts:
            return shortest_first
        self._oldest_first = not self._oldest_first
        if self._oldest_first:
            shortest_first.remove(prompts[0])
            shortest_first.insert(0, prompts[0])
        return shortest_first
