"""When guessing pays: what a guess costs, what it brings, and for how long one does without."""

from __future__ import annotations

import pytest

from ernie45.engine.speculation.control import Acceptance, StepCost, StepTimes

CHEAP = StepCost(fixed=0.9, token=0.1, guess=0.0)
DEAR = StepCost(fixed=0.0, token=1.0, guess=0.1)


@pytest.mark.parametrize(
    ("cost", "share", "count"),
    [
        # (1 + 0.5) / 1.1 = 1.36 and (1 + 0.5 + 0.25) / 1.2 = 1.46, then 1.44 and less.
        (CHEAP, 0.5, 2),
        (CHEAP, 1.0, 9),
        (CHEAP, 0.09, 0),
        (CHEAP, 0.12, 1),
        (DEAR, 0.99, 0),
        # A draft that takes half of a step: 1, 1.9 / 1.6 = 1.19, 2.71 / 2.2 = 1.23, 3.44 / 2.8 = 1.23, 4.1 / 3.4 = 1.2.
        (StepCost(fixed=0.9, token=0.1, guess=0.5), 0.9, 2),
        (StepCost(fixed=0.9, token=0.1, guess=0.95), 1.0, 0),
    ],
)
def test_as_many_guesses_as_bring_the_most_tokens_a_second(cost: StepCost, share: float, count: int) -> None:
    assert cost.best_count(share, 9) == count
    assert cost.best_count(share, 1) == min(count, 1)
    assert cost.best_count(share, 0) == 0


def measured(*, fixed: float, token: float) -> StepTimes:
    times = StepTimes()
    for _ in range(30):
        for size in (1, 2, 5):
            times.note_step(num_tokens=size, seconds=fixed + token * size)
    times.note_guesses(num_tokens=4, seconds=0.008)
    return times


def test_the_cost_is_that_of_the_steps_that_were_run() -> None:
    cost = measured(fixed=0.009, token=0.001).cost(1)
    assert (cost.fixed, cost.token, cost.guess) == pytest.approx((0.009, 0.001, 0.002))
    assert measured(fixed=0.009, token=0.001).cost(3).fixed == pytest.approx(0.003), "each of three rows has its part"


def test_old_measurements_fade() -> None:
    times = measured(fixed=0.009, token=0.001)
    for _ in range(200):
        for size in (1, 2, 5):
            times.note_step(num_tokens=size, seconds=0.002 + 0.005 * size)
    assert times.cost(1).token == pytest.approx(0.005, rel=0.01)


def test_before_and_after_a_first_size_it_assumes_something() -> None:
    times = StepTimes()
    unmeasured = times.cost(1)
    assert unmeasured.best_count(0.7, 8) > 0
    times.note_step(num_tokens=1, seconds=0.02)
    cost = times.cost(1)
    assert cost.token / (cost.token + cost.fixed) == unmeasured.token / (unmeasured.token + unmeasured.fixed)
    other = StepTimes()
    other.note_step(num_tokens=6, seconds=0.04)
    assert other.cost(1).fixed == pytest.approx(0.016)


def test_one_long_pause_of_the_machine_is_no_measurement() -> None:
    times = measured(fixed=0.009, token=0.001)
    times.note_step(num_tokens=5, seconds=10.0)
    assert times.cost(1).token < 0.002
    times.note_guesses(num_tokens=1, seconds=10.0)
    assert times.cost(1).guess < 0.004


def test_a_size_that_was_seen_once_in_a_bad_moment_is_forgotten() -> None:
    times = StepTimes()
    for _ in range(20):
        times.note_step(num_tokens=1, seconds=0.010)
    times.note_step(num_tokens=9, seconds=5.0)
    worst = times.cost(1)
    for _ in range(250):
        times.note_step(num_tokens=1, seconds=0.010)
    assert times.cost(1).token < worst.token
    assert times.cost(1).best_count(0.7, 8) > 0


def test_steps_that_seem_to_get_faster_with_more_tokens_still_cost_something() -> None:
    times = StepTimes()
    times.note_step(num_tokens=1, seconds=0.02)
    times.note_step(num_tokens=5, seconds=0.01)
    assert times.cost(1).token > 0


def test_the_number_of_guesses_follows_the_share() -> None:
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.note(num_proposed=4, num_accepted=4)
    assert acceptance.num_worthwhile(CHEAP, 9) == 9
    for _ in range(40):  # two of three are right
        acceptance.note(num_proposed=9, num_accepted=2)
    assert 1 < acceptance.num_worthwhile(CHEAP, 9) < 6
    assert acceptance.num_worthwhile(CHEAP, 1) == 1
    assert acceptance.num_worthwhile(CHEAP, 0) == 0


def guesses_of(right: bool, cost: StepCost, num_steps: int) -> list[int]:
    """How many tokens are guessed in each step, where all are right or all wrong."""
    acceptance, counts = Acceptance(), []
    for _ in range(num_steps):
        count = acceptance.num_worthwhile(cost, 8)
        counts.append(count)
        if count:
            acceptance.note(num_proposed=count, num_accepted=count if right else 0)
    return counts


@pytest.mark.parametrize(("right", "cost"), [(False, CHEAP), (True, DEAR)])
def test_what_loses_switches_itself_off(right: bool, cost: StepCost) -> None:
    counts = guesses_of(right, cost, 1000)
    assert max(counts[200:]) == 1
    assert sum(counts[200:]) <= 800 / 64 + 1
    assert sum(counts) < 60


def test_right_tries_are_followed_by_more_until_they_pay() -> None:
    dear = StepCost(fixed=0.9, token=0.1, guess=0.7)  # pays above a share of about 0.8
    counts = guesses_of(True, dear, 40)
    assert counts[0] == 1
    assert 0 not in counts
    assert counts[-1] == 8


def test_it_comes_back_when_guesses_get_better() -> None:
    acceptance = Acceptance()
    for _ in range(300):
        if acceptance.num_worthwhile(CHEAP, 8):
            acceptance.note(num_proposed=1, num_accepted=0)
    steps, count = 0, 0
    while count < 4:
        steps += 1
        assert steps < 300
        count = acceptance.num_worthwhile(CHEAP, 8)
        if count:
            acceptance.note(num_proposed=count, num_accepted=count)
