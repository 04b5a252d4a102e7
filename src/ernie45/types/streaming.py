"""Models whose routed experts are read from disk as they are needed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSlots:
    """How many routed experts are held in memory at a time, of all layers together: of the bank for text, and of that
    for pictures where the model sees."""

    text: int
    vision: int = 0
