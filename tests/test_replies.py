from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.replies import AsyncReplyStream, Reply, ReplyStream, collect, collect_async
from ernie45.tokenizer import TextAssembler, Tokenizer, load_tokenizer
from ernie45.types.results import ChatChunk, TokenEvent, TokenLogprob


class ByHand:
    """A handle whose events a test puts in; an exception is raised by poll."""

    def __init__(self, *events: TokenEvent | BaseException) -> None:
        self.events: deque[TokenEvent | BaseException] = deque(events)
        self.num_cancels = 0
        self.waiting: Callable[[], None] | None = None

    def put(self, *events: TokenEvent | BaseException) -> None:
        self.events.extend(events)
        callback, self.waiting = self.waiting, None
        if callback is not None:
            callback()

    def poll(self) -> TokenEvent | None:
        if not self.events:
            return None
        event = self.events.popleft()
        if isinstance(event, BaseException):
            raise event
        return event

    def notify(self, callback: Callable[[], None]) -> None:
        if self.events:
            callback()
        else:
            self.waiting = callback

    def cancel(self) -> None:
        self.num_cancels += 1


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    return tokenizer


def reply_of(handle: ByHand, tokenizer: Tokenizer | None = None, *stop: str, **options: Any) -> Reply:
    assembler = None if tokenizer is None else TextAssembler(tokenizer, stop)
    return Reply(handle, **{"prompt_tokens": 3, "with_logprobs": False, "assembler": assembler, **options})


def events_of(ids: list[int], finish_reason: Any = "length") -> list[TokenEvent]:
    last = len(ids) - 1
    return [
        TokenEvent(token_id=token_id, seconds=1.0 + n, finish_reason=finish_reason if n == last else None)
        for n, token_id in enumerate(ids)
    ]


def as_is(chunk: ChatChunk) -> ChatChunk:
    return chunk


# One reply


def test_every_event_is_a_chunk_and_together_they_are_the_completion(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat 你好")
    reply = reply_of(ByHand(*events_of(ids)), tokenizer)
    chunks = list(ReplyStream(reply, as_is))
    assert [chunk.token_ids for chunk in chunks] == [(token_id,) for token_id in ids]
    assert "".join(chunk.text for chunk in chunks) == "the cat 你好"
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(ids) - 1) + ["length"]
    done = reply.completion()
    assert (done.text, done.token_ids, done.finish_reason, done.logprobs) == (
        "the cat 你好",
        tuple(ids),
        "length",
        None,
    )
    assert chunks[-1].usage == done.usage


def test_usage_is_computed_from_the_events() -> None:
    usage = collect([reply_of(ByHand(*events_of([5, 6, 7, 8])))])[0].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert (usage.seconds_to_first_token, usage.seconds) == (1.0, 4.0)
    assert usage.tokens_per_second == pytest.approx(1.0)
    warm = TokenEvent(token_id=5, finish_reason="stop", cached_tokens=2)
    assert collect([reply_of(ByHand(warm))])[0].usage.cached_tokens == 2
    alone = collect([reply_of(ByHand(*events_of([5])))])[0].usage
    assert (alone.seconds_to_first_token, alone.tokens_per_second) == (1.0, None)
    none = collect([reply_of(ByHand(TokenEvent(finish_reason="cancelled", seconds=2.0)))])[0]
    assert (none.finish_reason, none.usage.seconds_to_first_token, none.usage.completion_tokens) == (
        "cancelled",
        None,
        0,
    )


def test_the_token_that_ends_a_reply_is_no_text_of_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    (stopped,) = collect([reply_of(ByHand(*events_of([*ids, ids[0]], "stop")), tokenizer)])
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("the cat", (*ids, ids[0]), "stop")
    (apart,) = collect([reply_of(ByHand(*events_of(ids, None), TokenEvent(finish_reason="stop")), tokenizer)])
    assert (apart.text, apart.token_ids) == ("the cat", tuple(ids))


def test_a_stop_text_ends_the_reply_and_cancels_the_rest(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat on the mat")
    handle = ByHand(*events_of(ids, None))  # the runner itself would go on
    (done,) = collect([reply_of(handle, tokenizer, "t sa")])
    assert (done.text, done.finish_reason) == ("the ca", "stop")
    assert handle.num_cancels == 1
    assert done.token_ids == tuple(ids[: len(done.token_ids)])
    assert len(handle.events) == len(ids) - len(done.token_ids) > 0


def test_a_stop_text_complete_in_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    (done,) = collect([reply_of(ByHand(*events_of(tokenizer.encode("the cat"))), tokenizer, "cat")])
    assert (done.text, done.finish_reason) == ("the ", "stop")


def test_held_back_text_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    chunks = list(ReplyStream(reply_of(ByHand(*events_of(ids)), tokenizer, "the catalogue"), as_is))
    assert [chunk.text for chunk in chunks] == [""] * (len(ids) - 1) + ["the cat"]
    assert chunks[-1].finish_reason == "length"
    half = tokenizer.encode("😀")[:2]
    (done,) = collect([reply_of(ByHand(*events_of(half)), tokenizer)])
    assert done.text == "�"


def test_without_a_tokenizer_texts_are_empty() -> None:
    chunks = list(ReplyStream(reply_of(ByHand(*events_of([5, 6]))), as_is))
    assert [(chunk.text, chunk.token_ids) for chunk in chunks] == [("", (5,)), ("", (6,))]


def test_logprobs_are_collected_where_asked_for() -> None:
    entry = TokenLogprob(token_id=5, logprob=-0.5)
    event = TokenEvent(token_id=5, logprob=entry, finish_reason="length")
    assert collect([reply_of(ByHand(event), with_logprobs=True)])[0].logprobs == (entry,)


def test_reasoning_is_told_apart_and_none_where_nobody_thinks(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a hat\n</think>\n\n<response>\nthe cat\n</response>\n")
    thinking = reply_of(ByHand(*events_of(ids)), assembler=TextAssembler(tokenizer, thinking=True))
    chunks = list(ReplyStream(thinking, as_is))
    assert len(chunks) == len(ids)
    assert "".join(chunk.reasoning for chunk in chunks) == thinking.completion().reasoning == "a hat"
    assert "".join(chunk.text for chunk in chunks) == thinking.completion().text == "the cat"
    assert thinking.completion().message == {"role": "assistant", "content": "the cat", "thoughts": "a hat"}
    (plain,) = collect([reply_of(ByHand(*events_of(ids)), tokenizer)])
    assert (plain.reasoning, plain.text) == (None, tokenizer.decode(ids))
    assert plain.message == {"role": "assistant", "content": plain.text}


def test_a_reply_that_ends_while_thinking_has_no_text(tokenizer: Tokenizer) -> None:
    handle = ByHand(*events_of(tokenizer.encode("the cat sat\n")))
    (done,) = collect([reply_of(handle, assembler=TextAssembler(tokenizer, ["cat"], thinking=True))])
    assert (done.text, done.reasoning, done.finish_reason) == ("", "the cat sat", "length")


# Streams


def test_a_stream_waits_for_what_comes_from_another_thread() -> None:
    handle = ByHand()
    stream = ReplyStream(reply_of(handle), as_is)
    timers = [threading.Timer(0.05 * (n + 1), handle.put, [event]) for n, event in enumerate(events_of([5, 6]))]
    for timer in timers:
        timer.start()
    assert [chunk.token_ids for chunk in stream] == [(5,), (6,)]
    assert list(stream) == []


@pytest.mark.parametrize("leave", ["close", "with", "drop"])
def test_leaving_a_stream_early_cancels_and_a_finished_one_does_not(leave: str) -> None:
    for events, num_cancels in ((events_of([5, 6], None), 1), (events_of([5]), 0)):
        handle = ByHand(*events)
        stream = ReplyStream(reply_of(handle), as_is)
        next(stream)
        if leave == "with":
            with stream:
                pass
        elif leave == "close":
            stream.close()
            stream.close()
        del stream
        gc.collect()
        assert handle.num_cancels == num_cancels


def test_what_makes_a_request_fail_is_raised_by_its_stream() -> None:
    stream = ReplyStream(reply_of(ByHand(*events_of([5], None), ValueError("lost"))), as_is)
    assert next(stream).token_ids == (5,)
    with pytest.raises(ValueError, match="lost"):
        next(stream)


def test_an_async_stream_waits_without_blocking_the_loop() -> None:
    handle = ByHand()
    beats = []

    async def beat() -> None:
        while True:
            beats.append(1)
            await asyncio.sleep(0.005)

    async def main() -> list[tuple[int, ...]]:
        beating = asyncio.create_task(beat())
        threading.Timer(0.1, handle.put, events_of([5, 6])).start()
        got = [chunk.token_ids async for chunk in AsyncReplyStream(reply_of(handle), as_is)]
        beating.cancel()
        return got

    assert asyncio.run(main()) == [(5,), (6,)]
    assert len(beats) > 3


@pytest.mark.parametrize("leave", ["cancel", "aclose", "with", "drop"])
def test_leaving_an_async_stream_early_cancels(leave: str) -> None:
    handle = ByHand(*events_of([5], None))

    async def main() -> None:
        stream = AsyncReplyStream(reply_of(handle), as_is)
        await stream.__anext__()
        if leave == "cancel":
            reading = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.01)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        elif leave == "aclose":
            await stream.aclose()
        elif leave == "with":
            async with stream:
                pass

    asyncio.run(main())
    gc.collect()
    assert handle.num_cancels == 1


def test_an_event_that_comes_after_the_loop_is_closed_hurts_nobody() -> None:
    handle = ByHand()

    async def main() -> None:
        reading = asyncio.ensure_future(AsyncReplyStream(reply_of(handle), as_is).__anext__())
        await asyncio.sleep(0.01)
        reading.cancel()

    asyncio.run(main())
    assert handle.waiting is not None
    handle.put(*events_of([5]))  # as the engine's thread would


# Many


def test_collect_takes_replies_as_they_come_and_gives_them_in_order() -> None:
    first, second = ByHand(), ByHand(*events_of([7, 8]))
    threading.Timer(0.05, first.put, events_of([5])).start()
    assert [done.token_ids for done in collect([reply_of(first), reply_of(second)])] == [(5,), (7, 8)]
    first = ByHand()
    threading.Timer(0.05, first.put, events_of([5])).start()
    second = ByHand(*events_of([7, 8]))
    done = asyncio.run(collect_async([reply_of(first), reply_of(second)]))
    assert [reply.token_ids for reply in done] == [(5,), (7, 8)]


@pytest.mark.parametrize("gather", [collect, lambda replies: asyncio.run(collect_async(replies))])
def test_when_one_fails_the_others_are_cancelled(gather: Callable[[list[Reply]], object]) -> None:
    handles = [ByHand(*events_of([5])), ByHand(), ByHand(ValueError("lost"))]
    with pytest.raises(ValueError, match="lost"):
        gather([reply_of(handle) for handle in handles])
    assert [handle.num_cancels > 0 for handle in handles] == [False, True, True]
