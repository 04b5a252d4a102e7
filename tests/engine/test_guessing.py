"""The engine with guesses: fewer steps, and nothing else is different."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ernie45.backends.base import Batch, Step
from ernie45.engine.engine import Engine
from ernie45.engine.speculation.control import StepCost, StepTimes
from ernie45.engine.speculation.proposer import Ask
from ernie45.engine.speculation.speculation import Speculation
from ernie45.engine.stream import TokenStream
from ernie45.errors import CorruptFileError
from ernie45.types.requests import Sampling, ThinkingLimit, TokenRequest
from ernie45.types.results import TokenEvent
from tests.engine.test_engine import (
    NAN_ID,
    NUM_TOKEN_IDS,
    STOP_ID,
    VOCAB_SIZE,
    CountingBackend,
    eventually,
    next_event,
    request,
)

Guess = Callable[[Ask], list[int]]


class Guessing:
    """A proposer that does as it is told."""

    max_tokens = 4
    wants_hidden = False

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self.slots: list[list[int]] = []

    def read(self, asks: Sequence[Ask]) -> None:
        pass

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.slots.append([ask.slot for ask in asks])
        return [self._guess(ask)[: ask.most] for ask in asks]

    def observe(self, slot: int, token_ids: Sequence[int], start: int, hidden: Tensor) -> None:
        raise AssertionError("no states were asked for")

    def forget(self, slot: int) -> None:
        pass


def successors(ask: Ask) -> list[int]:
    """What the counting backend will say."""
    return [(ask.token_ids[-1] + 1 + place) % VOCAB_SIZE for place in range(4)]


def wrong(ask: Ask) -> list[int]:
    return [11, 11, 11, 11]


def right_then_wrong(ask: Ask) -> list[int]:
    return [*successors(ask)[:2], 11, 12]


def at_random(ask: Ask) -> list[int]:
    numbers = random.Random(len(ask.token_ids))
    return [numbers.randrange(NUM_TOKEN_IDS) for _ in range(numbers.randrange(5))]


GUESSES = [successors, wrong, right_then_wrong, at_random]


TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(6)) * 1.5
ALMOST = TABLE + torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(7)) * 0.1


class Drawn(CountingBackend):
    """After each token one of several comes, by probabilities that depend on it alone."""

    def forward(self, batch: Batch) -> Step:
        self.steps.append(batch)
        return Step(logits=TABLE[batch.token_ids[batch.wanted]])


def as_a_draft(ask: Ask) -> list[int]:
    """Guesses drawn from slightly other probabilities, as those of a good small model."""
    ids = [ask.token_ids[-1]]
    for ahead in range(ask.most):
        ids.append(ask.sampler.guess(ALMOST[ids[-1]], ahead))
    return ids[1:]


@pytest.fixture(autouse=True)
def cheap_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether guessing pays here, where nothing is computed, is not the question."""
    monkeypatch.setattr(StepTimes, "cost", lambda self, num_rows: StepCost(fixed=1.0, token=0.05, guess=0.0))


@pytest.fixture
def started() -> Iterator[Callable[[CountingBackend, Guess | None], Engine]]:
    engines = []

    def start(backend: CountingBackend, guess: Guess | None) -> Engine:
        speculation = None if guess is None else Speculation(Guessing(guess))
        engine = Engine(backend, num_slots=3, context_tokens=4096, num_token_ids=NUM_TOKEN_IDS, speculation=speculation)
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


Start = Callable[[CountingBackend, Guess | None], Engine]


def events_of(stream: TokenStream) -> list[TokenEvent]:
    events = [next_event(stream)]
    while events[-1].finish_reason is None:
        events.append(next_event(stream))
    return events


def outcome(stream: TokenStream) -> list[tuple[object, ...]]:
    return [(event.token_id, event.logprob, event.finish_reason) for event in events_of(stream)]


def long_request(*token_ids: int, **options: object) -> TokenRequest:
    """One that meets no stop token for a while."""
    return dataclasses.replace(request(*token_ids, max_new_tokens=60, **options), stop_token_ids=frozenset([STOP_ID]))


def test_right_guesses_save_steps(started: Start) -> None:
    backend = CountingBackend()
    events = events_of(started(backend, successors).submit(request(8, max_new_tokens=30)))
    assert [event.token_id for event in events] == list(range(9, 39))
    assert len(backend.steps) < 20
    assert 2 < max(row.num_tokens for batch in backend.steps for row in batch.rows) <= 5
    assert all(len(batch.wanted) == len(batch.token_ids) for batch in backend.steps)
    assert (events[-1].draft_tokens, events[-1].accepted_draft_tokens) == (30 - len(backend.steps),) * 2


def test_rows_are_run_at_their_places_and_what_was_wrong_is_run_over(started: Start) -> None:
    backend = CountingBackend()
    events_of(started(backend, right_then_wrong).submit(request(8, max_new_tokens=30)))
    places: dict[int, int] = {}
    for batch in backend.steps:
        for position, token_id in zip(batch.positions.tolist(), batch.token_ids.tolist(), strict=True):
            places[position] = token_id
        assert batch.rows[0].start == batch.positions[0]
    assert [places[position] for position in range(30)] == list(range(8, 38))


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 2.0, "top_p": 1.0, "seed": 3},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01, "seed": 3, "logprobs": 1, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_replies_are_those_without_guesses(started: Start, guess: Guess, options: dict[str, object]) -> None:
    requests = [long_request(*ids, **options) for ids in ((8,), (3, 5, 20), (15, 1, 12))]
    plain, guessing = started(CountingBackend(), None), started(CountingBackend(), guess)
    alone = [outcome(plain.submit(each)) for each in requests]
    assert [outcome(guessing.submit(each)) for each in requests] == alone
    assert [outcome(stream) for stream in [guessing.submit(each) for each in requests]] == alone, "together"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_a_reply_ends_where_it_would(started: Start, max_new_tokens: int) -> None:
    backend = CountingBackend()
    engine = started(backend, successors)
    events = events_of(engine.submit(request(20, max_new_tokens=max_new_tokens)))
    assert [event.token_id for event in events] == list(range(21, 21 + max_new_tokens))
    assert events[-1].finish_reason == "length"
    assert max(int(batch.positions.max()) for batch in backend.steps) <= max_new_tokens - 1, "nothing is run beyond"
    stopped = events_of(engine.submit(request(2, max_new_tokens=9)))
    assert [event.token_id for event in stopped] == [3, 4, 5, 6, STOP_ID]
    assert stopped[-1].finish_reason == "stop"


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("limit", [0, 1, 3, 4, 5, 9])
def test_forced_tokens_come_where_they_would(started: Start, guess: Guess, limit: int) -> None:
    thinking = ThinkingLimit(max_tokens=limit, end_token_id=30, closing_ids=(10, 30, 11))
    forced = dataclasses.replace(request(19, max_new_tokens=14), thinking_limit=thinking)
    plain, guessing = started(CountingBackend(), None), started(CountingBackend(), guess)
    assert outcome(guessing.submit(forced)) == outcome(plain.submit(forced))


def test_nothing_is_guessed_where_tokens_are_forced(started: Start) -> None:
    backend = CountingBackend()
    thinking = ThinkingLimit(max_tokens=0, end_token_id=30, closing_ids=(10,) * 5)
    events_of(
        started(backend, successors).submit(dataclasses.replace(request(19, max_new_tokens=5), thinking_limit=thinking))
    )
    assert [len(batch.token_ids) for batch in backend.steps] == [1] * 5


def test_bad_guesses_cost_next_to_nothing_in_the_end(started: Start) -> None:
    backend = CountingBackend()
    endless = request(1, max_new_tokens=1000, logit_bias={3: 100.0})
    events = events_of(started(backend, wrong).submit(endless))
    assert [event.token_id for event in events] == [3] * 1000
    assert (events[-1].accepted_draft_tokens, len(backend.steps)) == (0, 1000)
    guessed = [len(batch.token_ids) - 1 for batch in backend.steps]
    assert sum(guessed[:50]) > 0
    assert sum(guessed[200:]) <= 800 / 64 + 1


def test_a_cancelled_row_leaves_and_gives_its_slot_back(started: Start) -> None:
    engine = started(CountingBackend(), wrong)
    stream = engine.submit(request(1, max_new_tokens=4000, logit_bias={3: 100.0}))
    next_event(stream)
    stream.cancel()
    assert eventually(lambda: engine.num_free_slots == 3)
    assert events_of(stream)[-1].finish_reason == "cancelled"


def test_a_bad_row_of_logits_ends_its_own_sequence_only(started: Start) -> None:
    engine = started(CountingBackend(), at_random)
    healthy, broken = engine.submit(request(20, max_new_tokens=15)), engine.submit(request(NAN_ID, max_new_tokens=9))
    with pytest.raises(CorruptFileError, match="nan"):
        events_of(broken)
    assert [event.token_id for event in events_of(healthy)] == list(range(21, 36))


def test_rows_may_have_different_numbers_of_guesses(started: Start) -> None:
    backend = CountingBackend()
    backend.may_run.clear()
    engine = started(backend, lambda ask: successors(ask) if ask.token_ids[0] == 8 else [])
    streams = [engine.submit(request(first, max_new_tokens=20)) for first in (8, 19, 18)]
    backend.may_run.set()
    ids = [[event.token_id for event in events_of(stream)] for stream in streams]
    assert ids == [list(range(first + 1, first + 21)) for first in (8, 19, 18)]
    widths = [[row.num_tokens for row in batch.rows] for batch in backend.steps]
    assert any(max(each) > 1 == min(each) for each in widths)


def test_the_statistics_count_all_sequences() -> None:
    speculation = Speculation(Guessing(successors))
    engine = Engine(CountingBackend(), num_slots=1, context_tokens=64, num_token_ids=50, speculation=speculation)
    events = [events_of(engine.submit(request(first, max_new_tokens=12)))[-1] for first in (8, 20)]
    engine.close()
    assert speculation.num_accepted == sum(event.accepted_draft_tokens for event in events) > 0
    assert speculation.num_proposed == sum(event.draft_tokens for event in events)


@pytest.mark.parametrize("guess", [as_a_draft, at_random, wrong])
def test_sampled_tokens_keep_their_distribution(started: Start, guess: Guess) -> None:
    backend = Drawn()
    sampled = TokenRequest(token_ids=(1,), sampling=Sampling(temperature=1.0, top_p=1.0, seed=11), max_new_tokens=2000)
    events = events_of(started(backend, guess).submit(sampled))
    ids = [1, *(event.token_id for event in events if event.token_id is not None)]
    assert len(ids) == 2001
    if guess is as_a_draft:
        assert len(backend.steps) < 1600, "many guesses of a draft are right"
        assert events[-1].accepted_draft_tokens > 0.3 * events[-1].draft_tokens

    probabilities = TABLE[:, :NUM_TOKEN_IDS].double().softmax(-1)
    counts = torch.zeros(VOCAB_SIZE, NUM_TOKEN_IDS, dtype=torch.float64)
    for before, after in itertools.pairwise(ids):
        counts[before, after] += 1
    expected = counts.sum(-1, keepdim=True) * probabilities
    often = expected >= 5  # the usual condition of the test; the rest of a row is one class
    rest, rest_expected = (counts * ~often).sum(-1), (expected * ~often).sum(-1)
    statistic = ((counts - expected).square() / expected)[often].sum()
    statistic += ((rest - rest_expected).square() / rest_expected)[rest_expected >= 5].sum()
    degrees = often.sum() + (rest_expected >= 5).sum() - often.any(-1).sum()
    p_value = torch.special.gammaincc(degrees / 2, statistic / 2)
    assert p_value > 0.001
    assert degrees > 50


def test_a_stream_is_read_while_it_grows(started: Start) -> None:
    engine = started(CountingBackend(), successors)
    stream = engine.submit(request(8, max_new_tokens=25))
    woken = threading.Event()
    stream.notify(woken.set)
    assert woken.wait(10)
    assert [event.token_id for event in events_of(stream)] == list(range(9, 34))
