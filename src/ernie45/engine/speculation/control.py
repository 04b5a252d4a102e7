"""How much to guess: as many tokens as bring the most new ones in the same time, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

# Of a step with one token, until steps of other sizes have been seen.
_UNMEASURED_TOKEN_SHARE = 0.2
_LEAST_TOKEN_SHARE = 0.02
_FORGETTING = 0.98  # a step, so that the last fifty count
_LEAST_WEIGHT = 0.01
_OUTLIER = 2.0  # times what was expected: a pause of the machine, not of the model

_FIRST_SHARE = 0.7
_SHARE_STEP = 0.15
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a step takes, in any unit of time: `fixed`, for each token that is run `token`, and `guess` more for each
    that was guessed."""

    fixed: float
    token: float
    guess: float

    def best_count(self, share: float, most: int) -> int:
        """How many tokens to guess, at most `most`, so that new tokens come the fastest where a guess whose
        predecessors are right is itself right with probability `share`.

        The first token always comes; the n-th guess adds one with probability shareⁿ (Leviathan et al. 2023, eq. 1).
        """
        seconds, num_new, likely = self.fixed + self.token, 1.0, 1.0
        best_count, best_rate = 0, num_new / seconds
        for count in range(1, most + 1):
            likely *= share
            num_new += likely
            seconds += self.token + self.guess
            if num_new / seconds > best_rate:
                best_count, best_rate = count, num_new / seconds
        return best_count


@final
class StepTimes:
    """What steps and guesses take on this machine, from those that were run lately."""

    def __init__(self) -> None:
        self._steps: dict[int, _Average] = {}
        self._guesses = _Average()

    def note_step(self, *, num_tokens: int, seconds: float) -> None:
        """A step ran so many tokens, guesses among them."""
        if self._steps:
            cost = self.cost(1)
            seconds = min(seconds, _OUTLIER * (cost.fixed + num_tokens * cost.token))
        for average in self._steps.values():
            average.weight *= _FORGETTING
        self._steps.setdefault(num_tokens, _Average()).add(seconds)
        # Sizes that did not come for long are measured anew.
        self._steps = {size: average for size, average in self._steps.items() if average.weight > _LEAST_WEIGHT}

    def note_guesses(self, *, num_tokens: int, seconds: float) -> None:
        """Guessing so many tokens took so long."""
        if self._guesses.weight:
            seconds = min(seconds, _OUTLIER * self._guesses.mean * num_tokens)
        self._guesses.weight *= _FORGETTING
        self._guesses.add(seconds / num_tokens)

    def cost(self, num_rows: int) -> StepCost:
        """What a step takes one of `num_rows` sequences, which share the fixed part: a straight line through the
        averages by number of tokens."""
        averages = self._steps.items()
        if not averages:
            return StepCost(fixed=1 - _UNMEASURED_TOKEN_SHARE, token=_UNMEASURED_TOKEN_SHARE, guess=0.0)
        weight = sum(average.weight for _, average in averages)
        size = sum(num_tokens * average.weight for num_tokens, average in averages) / weight
        seconds = sum(average.mean * average.weight for _, average in averages) / weight
        if len(averages) == 1:
            token = seconds / (1 / _UNMEASURED_TOKEN_SHARE + size - 1)
        else:
            spread = sum(average.weight * (num_tokens - size) ** 2 for num_tokens, average in averages)
            together = sum(average.weight * (num_tokens - size) * average.mean for num_tokens, average in averages)
            token = max(together / spread, _LEAST_TOKEN_SHARE * seconds / size)
        return StepCost(fixed=max(seconds - size * token, 0.0) / num_rows, token=token, guess=self._guesses.mean)


class _Average:
    """A mean of values, of which `weight` says how many count."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.weight = 0.0

    def add(self, value: float) -> None:
        self.weight += 1
        self.mean += (value - self.mean) / self.weight


@final
class Acceptance:
    """How often the guesses for one sequence are right, and so how many are worth their time.

    `share` is a moving average over guesses whose predecessors were right. Where not even one pays, one is made to try;
    if that is wrong, or right ones would not pay either, there is none for 8 steps, then for twice as many, up to 64.
    """

    def __init__(self) -> None:
        self.share = _FIRST_SHARE
        self._pause = 0
        self._next_pause = _FIRST_PAUSE
        self._tries = False
        self._could_pay = False

    def num_worthwhile(self, cost: StepCost, most: int) -> int:
        """How many tokens to guess now, at most `most`."""
        if self._pause:
            self._pause -= 1
            return 0
        count = cost.best_count(self.share, most)
        self._tries = count == 0
        self._could_pay = not self._tries or cost.best_count(1.0, most) > 0
        return min(1, most) if self._tries else count

    def note(self, *, num_proposed: int, num_accepted: int) -> None:
        """So many of the guesses were right, up to the first that was not."""
        for _ in range(num_accepted):
            self.share += _SHARE_STEP * (1 - self.share)
        if num_accepted < num_proposed:
            self.share -= _SHARE_STEP * self.share
        if self._tries and (num_accepted < num_proposed or not self._could_pay):
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        elif not self._tries:
            self._next_pause = _FIRST_PAUSE
