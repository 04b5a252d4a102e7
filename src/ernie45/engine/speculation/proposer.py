"""The seam between speculation and what guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ernie45.sampling import Sampler


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A sequence whose next tokens are to be guessed, `most` of them at most.

    `token_ids` are prompt and reply so far, the last of them not yet run; `slot` tells sequences apart. A draft's
    logits become guesses through `sampler.guess`.
    """

    slot: int
    token_ids: Sequence[int]
    most: int
    sampler: Sampler


class Proposer(Protocol):
    """Guesses what sequences go on with. A wrong guess costs time and changes nothing else."""

    @property
    def max_tokens(self) -> int:
        """Most tokens worth guessing at a time."""
        ...

    @property
    def wants_hidden(self) -> bool:
        """Whether `observe` needs the model's states."""
        ...

    def read(self, asks: Sequence[Ask]) -> None:
        """Read what it lacks of these sequences, or some of it: `propose` follows, whose time alone is that of
        guesses."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The next tokens of each sequence: up to `most`, or none."""
        ...

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        """What the model made of tokens that stay: states [n, h] before its last norm at positions `start` … of a
        sequence whose prompt and reply so far are `token_ids`."""
        ...

    def forget(self, slot: int) -> None:
        """The sequence in this slot has ended. Safe to repeat."""
        ...
