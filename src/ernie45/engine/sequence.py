"""Sequence: one request's progress through the engine."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from torch import Tensor

from ernie45.engine.media import SequenceMedia
from ernie45.engine.stream import TokenStream
from ernie45.sampling import Drawn, Sampler
from ernie45.types.requests import TokenRequest
from ernie45.types.results import FinishReason, TokenEvent


class Sequence:
    """A request with its stream, its slot once it has one, and how much of it lies in the KV cache.

    `token_ids` is the prompt and what was generated; the tokens from `num_cached` on are still to be run.
    """

    def __init__(
        self, request: TokenRequest, stream: TokenStream, sampler: Sampler, media: SequenceMedia | None = None
    ) -> None:
        self.request = request
        self.stream = stream
        self.sampler = sampler
        self.media = media
        self.token_ids = list(request.token_ids)
        self.num_prompt_tokens = len(request.token_ids)
        self.num_cached = 0
        self.slot: int | None = None
        self.finish_reason: FinishReason | None = None
        self._thinking_limit = request.thinking_limit
        self._forced_ids: deque[int] = deque()
        self._limit_thinking()
        self._submitted = time.perf_counter()

    @property
    def is_scoring(self) -> bool:
        return self.request.logit_positions is not None

    @property
    def in_prefill(self) -> bool:
        return self.num_cached < self.num_prompt_tokens and self.finish_reason is None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is just that of the highest logit, which `accept` may be given then."""
        return self.sampler.is_plain_greedy and not self._forced_ids

    def end_prefill(self) -> None:
        """The prompt is in the cache: its pictures are not needed any more."""
        if self.media is not None:
            self.media.release()
            self.request = replace(self.request, media=())

    def advance(self, logits: Tensor) -> None:
        """Draw the next token from raw `logits` [V], or take the one that has to come."""
        if self._forced_ids:
            self.accept(self.sampler.take(logits, self._forced_ids.popleft()), forced=True)
        else:
            self.accept(self.sampler(logits))

    def accept(self, drawn: Drawn, *, forced: bool = False) -> None:
        """Take the next token, tell the reader, and note whether it was the last."""
        self.token_ids.append(drawn.token_id)
        self._limit_thinking()
        if drawn.token_id in self.request.stop_token_ids and not forced:
            self.finish_reason = "stop"
        elif self.num_generated >= self.request.max_new_tokens:
            self.finish_reason = "length"
        self._put(token_id=drawn.token_id, logits=None, drawn=drawn)

    def _limit_thinking(self) -> None:
        """Have the reasoning end next where it is as long as it may be; no longer watch it once it has ended."""
        limit = self._thinking_limit
        if limit is None:
            return
        if self.num_generated and self.token_ids[-1] == limit.end_token_id:
            self._thinking_limit = None
        elif self.num_generated >= limit.max_tokens:
            self._thinking_limit = None
            self._forced_ids.extend(limit.closing_ids)

    def score(self, logits: Tensor) -> None:
        """Hand logits [n, V] of the next wanted positions to the reader; the prompt's last chunk ends the request."""
        if self.num_cached == self.num_prompt_tokens:
            self.finish_reason = "stop"
        elif not len(logits):
            return
        self._put(token_id=None, logits=logits, drawn=None)

    def cancel(self) -> None:
        self.finish_reason = "cancelled"
        self._put(token_id=None, logits=None, drawn=None)

    def fail(self, failure: BaseException) -> None:
        self.finish_reason = "cancelled"
        self.stream.fail(failure)

    def _put(self, *, token_id: int | None, logits: Tensor | None, drawn: Drawn | None) -> None:
        self.stream.put(
            TokenEvent(
                seconds=time.perf_counter() - self._submitted,
                token_id=token_id,
                logprob=drawn.logprob if drawn else None,
                finish_reason=self.finish_reason,
                logits=logits,
            )
        )
