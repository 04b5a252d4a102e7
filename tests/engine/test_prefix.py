"""Prefix reuse through the engine: how much is computed, and that replies do not change by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from ernie45 import ErnieModel
from ernie45.engine.engine import Engine
from ernie45.engine.media import MediaEncoder
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.types.requests import TokenRequest
from tests.engine.cache_reading import CacheReadingBackend, SeeingCacheBackend, events_of, read, reply
from tests.engine.test_engine import POISON_ID, CountingBackend, drain, next_event, request
from tests.engine.test_media import asking, clip, picture, vision_spec

SHARED = [1 + number * number % 31 for number in range(2000)]
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(backend: CacheReadingBackend, num_slots: int = 8, *, prefix_cache: bool = True) -> Engine:
        engines.append(
            Engine(backend, num_slots=num_slots, context_tokens=4096, num_token_ids=40, prefix_cache=prefix_cache)
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def alone(asked: TokenRequest) -> list[int]:
    """The reply of an engine that reuses nothing."""
    backend = SeeingCacheBackend(1, vision_spec()) if asked.media else CacheReadingBackend(1)
    engine = Engine(backend, num_slots=1, context_tokens=4096, num_token_ids=40, prefix_cache=False)
    ids = reply(engine, asked)[0]
    engine.close()
    return ids


@pytest.mark.parametrize(("prefix_tokens", "num_shared"), [(1, 2000), (PREFILL_CHUNK_TOKENS, 1536)])
def test_a_shared_prefix_is_computed_once(make_engine: MakeEngine, prefix_tokens: int, num_shared: int) -> None:
    backend = CacheReadingBackend(prefix_tokens)
    engine = make_engine(backend)
    asked = [request(*SHARED, *range(own, own + 20), max_new_tokens=1) for own in range(8)]
    backend.may_run.clear()
    streams = [engine.submit(each) for each in asked]
    backend.may_run.set()
    events = [next_event(stream) for stream in streams]
    assert backend.num_run == num_shared + 8 * (2020 - num_shared)
    assert sorted(event.cached_tokens for event in events) == [0] + [num_shared] * 7
    assert [event.token_id for event in events] == [alone(each)[0] for each in asked]
    # Now it lies in free slots.
    later = request(*SHARED, 33, 34, max_new_tokens=1)
    before = backend.num_run
    assert reply(engine, later) == (alone(later), num_shared)
    assert backend.num_run - before == 2002 - num_shared


def test_a_prefix_of_several_running_prompts_is_computed_by_any_of_them_once(make_engine: MakeEngine) -> None:
    backend = CacheReadingBackend(1)
    engine = make_engine(backend)
    asked = [request(*SHARED[:length], *[own] * (5 * own), max_new_tokens=3) for own, length in ((38, 2000), (35, 700))]
    asked += [request(*SHARED[:1100], *range(20, 29), max_new_tokens=3)]
    backend.may_run.clear()
    streams = [engine.submit(each) for each in asked]
    backend.may_run.set()
    assert [drain(stream)[0] for stream in streams] == [alone(each) for each in asked]
    # 512 · 3 and 464 of the first, and what each has of its own; the others' edges lie where its chunks end.
    assert sum(row.num_tokens for rows in backend.steps for row in rows if row.num_tokens > 1) <= 2000 + 190 + 175 + 9


@pytest.mark.parametrize(("prefix_tokens", "num_shared"), [(1, 1 + 609 - 1), (PREFILL_CHUNK_TOKENS, 512)])
def test_the_next_turn_of_a_chat_begins_where_the_last_ended(
    make_engine: MakeEngine, prefix_tokens: int, num_shared: int
) -> None:
    backend = CacheReadingBackend(prefix_tokens)
    engine = make_engine(backend, 2)
    first = request(*SHARED[:600], max_new_tokens=9)
    ids, num_cached = reply(engine, dataclasses.replace(first, stop_token_ids=frozenset()))
    assert num_cached == 0
    second = request(*SHARED[:600], *ids, 1, 2, 3)
    assert reply(engine, second) == (alone(second), min(num_shared, 608))


def test_chats_that_alternate_do_not_overwrite_each_other(make_engine: MakeEngine) -> None:
    backend = CacheReadingBackend(1)
    engine = make_engine(backend, 4)
    chats = {start: [*SHARED[:300], start, start] for start in (5, 6, 8)}
    for turn in range(4):
        for start, ids in chats.items():
            before = backend.num_run
            asked = dataclasses.replace(request(*ids, max_new_tokens=10), stop_token_ids=frozenset())
            new, num_cached = reply(engine, asked)
            assert new == alone(asked)
            if turn:
                assert num_cached == len(ids) - 1 - 3
                assert backend.num_run - before == 4 + 9
            chats[start] = [*ids, *new, turn, start, turn]


def test_without_the_switch_everything_is_computed(make_engine: MakeEngine) -> None:
    backend = CacheReadingBackend(1)
    engine = make_engine(backend, prefix_cache=False)
    asked = request(*SHARED[:600], max_new_tokens=1)
    assert [reply(engine, asked)[1] for _ in range(3)] == [0, 0, 0]
    assert backend.num_run == 3 * 600


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"prefix_cache": False}])
def test_a_loaded_model_reuses_prefixes_unless_switched_off(options: dict[str, Any]) -> None:
    with ErnieModel.from_pretrained("ernie45/tiny-dense", context_tokens=700, progress=False, **options) as model:
        runs = [read(model._loaded.runner.submit(request(*SHARED[:600], own))) for own in (40, 40, 41)]
    (cold, none), (warm, reused), (_, of_other) = runs
    assert warm == cold
    assert none == 0
    assert [reused >= 512, of_other >= 512] == [options.get("prefix_cache", True)] * 2


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-vl"])
def test_real_models_give_the_same_logits_with_what_they_took_over(name: str) -> None:
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is 12 + 30? " * 120}]
    if name == "tiny-vl":
        content.insert(0, {"type": "image", "image": Image.new("RGB", (56, 56), "red")})
    with ErnieModel.from_pretrained(f"ernie45/{name}", context_tokens=2048, progress=False) as model:
        prompt = model.render([{"role": "user", "content": content}])
        last = len(prompt) - 1
        logits: list[torch.Tensor] = []
        asked = TokenRequest(
            token_ids=prompt.token_ids,
            media=prompt.media,
            logit_positions=(last - 1, last),
            on_logits=lambda piece: logits.append(piece.clone()),
        )
        cold, warm = (events_of(model._loaded.runner.submit(asked))[-1] for _ in range(2))
    assert last > 2 * PREFILL_CHUNK_TOKENS
    assert (cold.cached_tokens, warm.cached_tokens >= 2 * PREFILL_CHUNK_TOKENS) == (0, True)
    assert len(logits[0]) == 2
    assert torch.equal(logits[0], logits[1])


def test_a_backend_that_promises_nothing_computes_everything() -> None:
    backend = CountingBackend()
    engine = Engine(backend, num_slots=2, context_tokens=2048, num_token_ids=40)
    for _ in range(2):
        assert events_of(engine.submit(request(*SHARED[:600], max_new_tokens=1)))[-1].cached_tokens == 0
    engine.close()
    assert sum(row.num_tokens for batch in backend.steps for row in batch.rows) == 1200


@pytest.mark.parametrize("prefix_tokens", [1, PREFILL_CHUNK_TOKENS])
def test_scoring_takes_over_what_lies_before_its_first_position(make_engine: MakeEngine, prefix_tokens: int) -> None:
    backend = CacheReadingBackend(prefix_tokens)
    engine = make_engine(backend)
    ids = tuple(SHARED[:1500])
    logits: list[torch.Tensor] = []
    asked = TokenRequest(token_ids=ids, logit_positions=(1100, 1101, 1499), on_logits=logits.append)
    cold, warm = events_of(engine.submit(asked)), events_of(engine.submit(asked))
    assert cold[-1].cached_tokens == 0
    assert warm[-1].cached_tokens == (1100 if prefix_tokens == 1 else 1024)
    rows = torch.cat(logits)
    assert len(rows) == 6
    assert torch.equal(rows[:3], rows[3:])
    whole = dataclasses.replace(asked, logit_positions=tuple(range(1500)))
    assert events_of(engine.submit(whole))[-1].cached_tokens == 0


def test_what_a_failed_prompt_had_computed_is_still_right(make_engine: MakeEngine) -> None:
    class Poisoned(CacheReadingBackend):
        def _write(self, batch: object) -> None:
            super()._write(batch)  # type: ignore[arg-type]
            if POISON_ID in batch.token_ids.tolist():  # type: ignore[attr-defined]
                raise ArithmeticError("poisoned")

    engine = make_engine(Poisoned(1), 1)
    with pytest.raises(ArithmeticError):
        reply(engine, request(*SHARED[:600], POISON_ID, 5))
    asked = request(*SHARED[:600], 4, 5)
    assert reply(engine, asked) == (alone(asked), 512)


# Pictures: all of them have the same token ids


def seeing(make_engine: MakeEngine, prefix_tokens: int = 1) -> tuple[SeeingCacheBackend, Engine]:
    """An engine that forgets features at once, so that what is encoded shows."""
    backend = SeeingCacheBackend(prefix_tokens, vision_spec())
    engine = make_engine(backend, 4)
    engine._encoder = MediaEncoder(backend, cache_bytes=1)
    return backend, engine


def test_another_picture_under_the_same_text_is_never_a_hit(make_engine: MakeEngine) -> None:
    backend, engine = seeing(make_engine)
    first, other = asking(5, 6, picture(7), 20, 21), asking(5, 6, picture(8), 20, 21)
    assert first.token_ids == other.token_ids
    assert reply(engine, first) == (alone(first), 0)
    assert reply(engine, other) == (alone(other), 2)
    assert alone(first) != alone(other)
    assert len(backend.encoded) == 2
    as_text = dataclasses.replace(first, media=())
    assert reply(engine, as_text)[1] == 2


def test_a_picture_within_the_prefix_is_not_encoded_again(make_engine: MakeEngine) -> None:
    backend, engine = seeing(make_engine)
    first = asking(5, picture(7, 4, 4), 6, picture(9), 20, 21)
    assert reply(engine, first) == (alone(first), 0)
    second = asking(5, picture(7, 4, 4), 6, picture(9), 20, 22, picture(8, 4, 4), 23)
    assert reply(engine, second) == (alone(second), 13)
    assert backend.encoded == [(1, 4, 4), (1, 2, 4), (1, 4, 4)]
    # Of one that the prefix ends in, the features are needed.
    third = asking(5, picture(7, 4, 4), 6, picture(9, 2, 2), 20)
    assert reply(engine, third) == (alone(third), 8)
    assert backend.encoded[3:] == [(1, 2, 2)]


def test_a_prefix_may_end_within_a_picture(make_engine: MakeEngine) -> None:
    backend, engine = seeing(make_engine, PREFILL_CHUNK_TOKENS)
    first, second = (asking(*[1] * 510, picture(7, 4, 4), *[2] * 600, own) for own in (20, 21))
    early = asking(*[1] * 508, picture(7, 4, 4), 5)  # the first 512 end with a placeholder
    for asked, num_cached in ((first, 0), (second, 1024), (early, 0), (early, 512)):
        assert reply(engine, asked) == (alone(asked), num_cached)
    assert len(backend.encoded) == 3


def test_questions_on_a_clip_asked_at_once_share_its_tokens(make_engine: MakeEngine) -> None:
    backend, engine = seeing(make_engine)
    long = clip(7, num_frames=8, rows=40, columns=40)  # 1,600 tokens, encoded in four parts
    asked = [asking(5, long, own, own) for own in (20, 21, 22)]
    backend.may_run.clear()
    streams = [engine.submit(each) for each in asked]
    backend.may_run.set()
    assert [drain(stream)[0] for stream in streams] == [alone(each) for each in asked]
    assert sum(row.num_tokens for rows in backend.steps for row in rows if row.num_tokens > 1) == 1603 + 3 * 2
