"""From a runner's token events to chunks of text, and from chunks to whole replies: sync, async and many at once."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, final

from typing_extensions import Self

from ernie45.runners.base import Handle, wait_until_ready
from ernie45.tokenizer import TextAssembler, TextDelta
from ernie45.types.results import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    FinishReason,
    TokenEvent,
    TokenLogprob,
    Usage,
)

T_co = TypeVar("T_co", covariant=True)


@final
class Reply:
    """One reply under way: takes token events as they come, gives chunks, and in the end the completion.

    Both have the fields of a chat's; those of a plain completion are the same without reasoning. `assembler` is None
    for a checkpoint without a tokenizer: every text is then "". A stop text ends the reply here, since the engine
    knows ids only.
    """

    def __init__(
        self, handle: Handle, *, prompt_tokens: int, assembler: TextAssembler | None, with_logprobs: bool
    ) -> None:
        self.handle = handle
        self.finished = False
        self._prompt_tokens = prompt_tokens
        self._assembler = assembler
        self._with_logprobs = with_logprobs
        self._deltas: list[TextDelta] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason = "cancelled"
        self._cached_tokens = 0
        self._first_seconds: float | None = None
        self._seconds = 0.0
        self._draft_tokens = 0
        self._accepted_draft_tokens = 0

    def poll(self) -> ChatChunk | None:
        """The next chunk, or None if there is none yet. Not to be called once `finished`."""
        event = self.handle.poll()
        return None if event is None else self._take(event)

    def cancel(self) -> None:
        self.handle.cancel()

    def completion(self) -> ChatCompletion:
        """Everything so far as one result."""
        thinking = self._assembler is not None and self._assembler.thinking
        return ChatCompletion(
            text="".join(delta.text for delta in self._deltas),
            reasoning="".join(delta.reasoning for delta in self._deltas) if thinking else None,
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            usage=self._usage(),
            logprobs=tuple(self._logprobs) if self._with_logprobs else None,
        )

    def _take(self, event: TokenEvent) -> ChatChunk:
        reason = event.finish_reason
        new_ids = () if event.token_id is None else (event.token_id,)
        new_logprobs = () if event.logprob is None else (event.logprob,)
        deltas: list[TextDelta] = []
        if self._assembler is not None:
            # The token that ends a reply is no text of it.
            if event.token_id is not None and reason != "stop":
                deltas.append(self._assembler.push(event.token_id))
            if self._assembler.stopped:
                reason = "stop"
                self.cancel()
            elif reason is not None:
                deltas.append(self._assembler.finish())
                reason = "stop" if self._assembler.stopped else reason
        self._seconds = event.seconds
        self._cached_tokens = event.cached_tokens
        self._draft_tokens, self._accepted_draft_tokens = event.draft_tokens, event.accepted_draft_tokens
        if new_ids and self._first_seconds is None:
            self._first_seconds = event.seconds
        self._deltas += deltas
        self._token_ids += new_ids
        self._logprobs += new_logprobs
        if reason is not None:
            self.finished = True
            self._finish_reason = reason
        return ChatChunk(
            text="".join(delta.text for delta in deltas),
            reasoning="".join(delta.reasoning for delta in deltas),
            token_ids=new_ids,
            logprobs=new_logprobs,
            finish_reason=reason,
            usage=self._usage() if reason is not None else None,
        )

    def _usage(self) -> Usage:
        num_tokens = len(self._token_ids)
        rate = None
        if num_tokens > 1 and self._first_seconds is not None and self._seconds > self._first_seconds:
            rate = (num_tokens - 1) / (self._seconds - self._first_seconds)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=num_tokens,
            cached_tokens=self._cached_tokens,
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
            seconds_to_first_token=self._first_seconds,
            seconds=self._seconds,
            tokens_per_second=rate,
        )


@final
class ReplyStream(Generic[T_co]):
    """An iterator over a reply's chunks. Leaving it early (`break`, `close()`, `with`, or letting go of it) cancels."""

    def __init__(self, reply: Reply, convert: Callable[[ChatChunk], T_co], *, owner: object = None) -> None:
        self._reply = reply
        self._convert = convert
        self._owner = owner  # a model that nobody else holds lives as long as its streams

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T_co:
        if self._reply.finished:
            raise StopIteration
        while (chunk := self._reply.poll()) is None:
            wait_until_ready(self._reply.handle)
        return self._convert(chunk)

    def close(self) -> None:
        """End the reply now; its slot is free within a step."""
        if not self._reply.finished:
            self._reply.finished = True
            self._reply.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@final
class AsyncReplyStream(Generic[T_co]):
    """The async twin of ReplyStream: cancelling the task that reads it cancels the reply."""

    def __init__(self, reply: Reply, convert: Callable[[ChatChunk], T_co], *, owner: object = None) -> None:
        self._reply = reply
        self._convert = convert
        self._owner = owner  # a model that nobody else holds lives as long as its streams

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T_co:
        if self._reply.finished:
            raise StopAsyncIteration
        while (chunk := self._reply.poll()) is None:
            await self._ready()
        return self._convert(chunk)

    async def _ready(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        self._reply.handle.notify(_waker(loop, ready))
        try:
            await ready.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the reply now; its slot is free within a step."""
        if not self._reply.finished:
            self._reply.finished = True
            self._reply.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._reply.finished:
            self._reply.cancel()


def as_it_is(chunk: ChatChunk) -> ChatChunk:
    """For streams of chats, whose chunks need no conversion."""
    return chunk


def as_completion_chunk(chunk: ChatChunk) -> CompletionChunk:
    return CompletionChunk(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        finish_reason=chunk.finish_reason,
        usage=chunk.usage,
    )


def as_completion(done: ChatCompletion) -> Completion:
    return Completion(
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        usage=done.usage,
        logprobs=done.logprobs,
    )


def collect(replies: Sequence[Reply]) -> list[ChatCompletion]:
    """Wait for all replies, reading each as it goes; an error or interrupt cancels the rest."""
    ready: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    remaining = 0
    try:
        for reply in replies:
            remaining += 1
            reply.handle.notify(lambda r=reply: ready.put(r))  # type: ignore[misc]
        while remaining:
            reply = ready.get()
            for _ in _available(reply):
                pass
            if reply.finished:
                remaining -= 1
            else:
                reply.handle.notify(lambda r=reply: ready.put(r))  # type: ignore[misc]
    finally:
        for reply in replies:
            if not reply.finished:
                reply.cancel()
    return [reply.completion() for reply in replies]


async def collect_async(replies: Sequence[Reply]) -> list[ChatCompletion]:
    """The async twin of `collect`: cancelling the task cancels every reply."""
    try:
        await asyncio.gather(*(_drain(reply) for reply in replies))
    finally:
        for reply in replies:
            if not reply.finished:
                reply.cancel()
    return [reply.completion() for reply in replies]


async def _drain(reply: Reply) -> None:
    async for _ in AsyncReplyStream(reply, lambda chunk: chunk):
        pass


def _available(reply: Reply) -> Iterator[ChatChunk]:
    while not reply.finished and (chunk := reply.poll()) is not None:
        yield chunk


def _waker(loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> Callable[[], None]:
    def wake() -> None:
        # The loop may be closed by now, with nobody waiting; this runs on the engine's thread, which must not mind.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ready.set)

    return wake
