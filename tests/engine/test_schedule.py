"""Who is served when: short prompts beside long ones, and running rows beside both."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import pytest

from ernie45.engine.engine import Engine
from ernie45.engine.schedule import PrefillSchedule
from ernie45.engine.stream import TokenStream
from ernie45.errors import InvalidRequestError
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.sampling import Sampler
from tests.engine.cache_reading import CacheReadingBackend
from tests.engine.test_engine import drain, request
from tests.engine.test_slots import sequence

LONG = 4000


@pytest.fixture
def backend() -> CacheReadingBackend:
    return CacheReadingBackend(prefix_tokens=1)


@pytest.fixture
def engine(backend: CacheReadingBackend) -> Iterator[Engine]:
    engine = Engine(backend, num_slots=6, context_tokens=4500, num_token_ids=40)
    yield engine
    backend.may_run.set()
    engine.close()


def test_turns_alternate_between_the_oldest_prompt_and_the_shortest() -> None:
    schedule = PrefillSchedule()
    oldest, middle, short = (sequence(*range(count)) for count in (30, 20, 5))
    turns = [schedule.order([oldest, middle, short]) for _ in range(4)]
    assert turns == [[oldest, short, middle], [short, middle, oldest]] * 2
    oldest.num_cached = 28  # what counts is what is left
    assert schedule.order([oldest, middle, short])[0] is oldest
    assert schedule.order([oldest, middle, short]) == [oldest, short, middle]
    assert schedule.order([]) == []


def prefills(backend: CacheReadingBackend, slot: int) -> list[int]:
    """The numbers of the steps that ran prompt tokens in a slot; prompts of one token are not used here."""
    return [n for n, rows in enumerate(backend.steps) if rows[0].slot == slot and rows[0].num_tokens > 1]


def slot_of(backend: CacheReadingBackend, num_tokens: int) -> int:
    return next(rows[0].slot for rows in backend.steps if rows[0].num_tokens == num_tokens)


@pytest.mark.parametrize("step", range(2, 12))
def test_a_short_request_beside_a_long_prefill_waits_for_two_chunks_at_most(
    engine: Engine, backend: CacheReadingBackend, step: int
) -> None:
    streams: list[TokenStream] = []
    backend.before_step[step] = lambda: streams.append(engine.submit(request(8, 9, 10, max_new_tokens=2)))
    backend.may_run.clear()
    running = engine.submit(request(20, 21, max_new_tokens=40, logit_bias={3: 100.0}))
    long = engine.submit(request(*[1] * LONG, max_new_tokens=2))
    backend.may_run.set()
    for stream in (running, long):
        drain(stream)
    assert len(drain(streams[0])[0]) == 2
    first = next(n for n, rows in enumerate(backend.steps) if rows[0].num_tokens == 3)
    chunks = [n for n in prefills(backend, slot_of(backend, PREFILL_CHUNK_TOKENS)) if step <= n < first]
    assert len(chunks) <= 2


def test_running_rows_get_a_token_every_turn_and_a_turn_is_one_chunk(
    engine: Engine, backend: CacheReadingBackend
) -> None:
    backend.may_run.clear()
    running = engine.submit(request(20, 21, max_new_tokens=60, logit_bias={3: 100.0}))
    others = [engine.submit(request(*[start] * count)) for start, count in ((1, 1800), (2, 500), (3, 300), (4, 200))]
    backend.may_run.set()
    for stream in (running, *others):
        drain(stream)
    between = [0]
    for rows in backend.steps:
        if rows[0].num_tokens == 1:
            between.append(0)
        else:
            between[-1] += rows[0].num_tokens
    assert max(between) <= PREFILL_CHUNK_TOKENS
    assert sum(between) == 2 + 1800 + 500 + 300 + 200
    assert between.count(0) < len(between)


def test_a_long_prompt_gets_every_second_turn_however_many_short_ones_come(
    engine: Engine, backend: CacheReadingBackend
) -> None:
    streams: list[TokenStream] = []

    def submit_more() -> None:
        prompt = [1 + len(streams) % 30] * (PREFILL_CHUNK_TOKENS - 1 - len(streams) % 7)
        streams.append(engine.submit(request(*prompt, max_new_tokens=1)))
        if len(streams) < 40:
            backend.before_step[len(backend.steps) + 1] = submit_more

    backend.before_step[1] = submit_more
    assert len(drain(engine.submit(request(*[39] * LONG, max_new_tokens=1)))[0]) == 1
    for stream in streams:
        drain(stream)
    steps = prefills(backend, slot_of(backend, PREFILL_CHUNK_TOKENS))
    in_long = [n for n, rows in enumerate(backend.steps) if rows[0].slot == backend.steps[0][0].slot][:8]
    assert len(steps) >= 7
    assert all(later - earlier <= 2 for earlier, later in itertools.pairwise(in_long))
    assert len(backend.steps) > 2 * len(in_long), "short ones came all the time"


def test_more_requests_than_slots_wait_in_order(backend: CacheReadingBackend) -> None:
    engine = Engine(backend, num_slots=1, context_tokens=64, num_token_ids=40)
    backend.may_run.clear()
    streams = [engine.submit(request(*[start] * (2 + start % 3))) for start in range(20)]
    backend.may_run.set()
    assert all(drain(stream)[1] in ("length", "stop") for stream in streams)
    engine.close()
    assert [rows[0].num_tokens for rows in backend.steps if rows[0].num_tokens > 1] == [
        2 + start % 3 for start in range(20)
    ]


def test_what_waits_has_no_sampler_yet_but_its_options_are_checked(
    engine: Engine, backend: CacheReadingBackend
) -> None:
    def num_samplers() -> int:
        gc.collect()
        return sum(type(thing) is Sampler for thing in gc.get_objects())

    before = num_samplers()
    backend.may_run.clear()
    streams = [engine.submit(request(5, number % 40, presence_penalty=0.5)) for number in range(300)]
    assert num_samplers() - before <= 6
    with pytest.raises(InvalidRequestError, match="999"):
        engine.submit(request(5, logit_bias={999: 1.0}))
    backend.may_run.set()
    assert [len(drain(stream)[0]) for stream in streams] == [3] * 300


def test_a_sampler_that_cannot_be_built_ends_its_request_alone(
    engine: Engine, backend: CacheReadingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.may_run.clear()
    running = [engine.submit(request(5, number)) for number in range(6)]
    unlucky, after = engine.submit(request(7)), engine.submit(request(8))
    build = engine._build_sampler

    def failing(sampling: object, prompt_ids: tuple[int, ...] = ()) -> Sampler:
        if prompt_ids == (7,):
            raise MemoryError
        return build(sampling, prompt_ids)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_build_sampler", failing)
    backend.may_run.set()
    with pytest.raises(MemoryError):
        drain(unlucky)
    assert [drain(stream)[1] for stream in (*running, after)] == ["length"] * 7
