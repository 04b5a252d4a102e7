"""The random numbers of one request, which a guess may look at before the token they belong to is drawn."""

from __future__ import annotations

import random
from collections import deque
from typing import final


@final
class RandomNumbers:
    """One number from 0 to 1 for each token, in order.

    A draft that draws its guess for a token with the number that will draw the token itself guesses right wherever the
    two distributions agree, and nothing about the draw itself depends on whether there was a guess.
    """

    def __init__(self, seed: int | None) -> None:
        # Python's generator gives a seed's numbers alike on every machine; for None the system draws a seed.
        self._source = random.Random(seed)
        self._seen: deque[float] = deque()

    def take(self) -> float:
        """The next token's number."""
        return self._seen.popleft() if self._seen else self._source.random()

    def ahead(self, num_tokens: int) -> float:
        """The number of the token that comes `num_tokens` after the next, left where it is."""
        while len(self._seen) <= num_tokens:
            self._seen.append(self._source.random())
        return self._seen[num_tokens]
