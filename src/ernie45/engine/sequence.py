"""Sequence: one request's progress through the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from ernie45.engine.media import SequenceMedia
from ernie45.engine.stream import TokenStream
from ernie45.sampling import Drawn, Sampler
from ernie45.types.requests import TokenRequest
from ernie45.types.results import FinishReason, TokenEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A request in the queue, and its reader's stream. No more is made of it before there is a slot, so that a long
    list takes little memory. `seconds` is when it came, on the clock `time.perf_counter`."""

    request: TokenRequest
    stream: TokenStream
    seconds: float = field(default_factory=time.perf_counter)

    def cancel(self) -> None:
        self.stream.put(TokenEvent(seconds=time.perf_counter() - self.seconds, finish_reason="cancelled"))


class Sequence:
    """A request with its stream, its slot once it has one, and how much of it lies in the KV cache.

    `token_ids` is the prompt and what was generated; the tokens from `num_cached` on are still to be run. Of the prompt
    `num_reused` tokens were not run but taken over from other sequences. `placed` says where in it which pictures are,
    by their digests. Of the reply `num_guessed` tokens were guessed before they were drawn, `num_accepted` rightly.
    """

    def __init__(self, submission: Submission, sampler: Sampler, media: SequenceMedia | None = None) -> None:
        request = submission.request
        self.request = request
        self.stream = submission.stream
        self.sampler = sampler
        self.media = media
        self.token_ids = list(request.token_ids)
        self.placed = frozenset((item.first, item.media.digest) for item in request.media)
        self.num_prompt_tokens = len(request.token_ids)
        self.num_cached = 0
        self.num_reused = 0
        self.num_guessed = 0
        self.num_accepted = 0
        self.slot: int | None = None
        self.finish_reason: FinishReason | None = None
        self._thinking_limit = request.thinking_limit
        self._forced_ids: deque[int] = deque()
        self._limit_thinking()
        self._submitted_seconds = submission.seconds

    @property
    def is_scoring(self) -> bool:
        return self.request.logit_positions is not None

    @property
    def in_prefill(self) -> bool:
        return self.num_cached < self.num_prompt_tokens and self.finish_reason is None

    @property
    def max_reused(self) -> int:
        """Most tokens of the prompt that may be taken over: the ones whose logits are wanted have to be run."""
        return min((self.num_prompt_tokens - 1, *(self.request.logit_positions or ())))

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is just that of the highest logit, which `accept` may be given then."""
        return self.sampler.is_plain_greedy and not self._forced_ids

    @property
    def max_guesses(self) -> int:
        """Most tokens worth guessing after the last: one more is drawn, and the reply may have to end there. What has
        to come next is not guessed."""
        return 0 if self._forced_ids else self.request.max_new_tokens - self.num_generated - 1

    def take_over(self, num_tokens: int) -> None:
        """Its first `num_tokens` lie in its slot without having been run."""
        self.num_reused += num_tokens - self.num_cached
        self.num_cached = num_tokens
        if self.media is not None:
            self.media.skip(num_tokens)

    def end_prefill(self) -> None:
        """The prompt is in the cache: its pictures are not needed any more."""
        if self.media is not None:
            self.media.release()
            self.request = replace(self.request, media=())

    def advance(self, logits: Tensor, guess: int | None = None) -> None:
        """Draw the next token from raw `logits` [V], or take the one that has to come."""
        if self._forced_ids:
            self.accept(self.sampler.take(logits, self._forced_ids.popleft()), guess, forced=True)
        else:
            self.accept(self.sampler(logits), guess)

    def accept(self, drawn: Drawn, guess: int | None = None, *, forced: bool = False) -> None:
        """Take the next token, tell the reader, and note whether it was the last, and whether it was guessed."""
        self.token_ids.append(drawn.token_id)
        self.num_accepted += drawn.token_id == guess
        self._limit_thinking()
        if drawn.token_id in self.request.stop_token_ids and not forced:
            self.finish_reason = "stop"
        elif self.num_generated >= self.request.max_new_tokens:
            self.finish_reason = "length"
        self._put(token_id=drawn.token_id, drawn=drawn)

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

    def score(self, pieces: Iterable[Tensor]) -> None:
        """Hand on logits [n, V] of the next wanted positions, as long as the reader has not cancelled; the prompt's
        last chunk ends the request."""
        for logits in pieces:
            if self.stream.cancelled:
                self.cancel()
                return
            if self.request.on_logits is not None:
                self.request.on_logits(logits)
            del logits  # before the next are made
        if self.num_cached == self.num_prompt_tokens:
            self.finish_reason = "stop"
            self._put(token_id=None, drawn=None)

    def cancel(self) -> None:
        self.finish_reason = "cancelled"
        self._put(token_id=None, drawn=None)

    def fail(self, failure: BaseException) -> None:
        self.finish_reason = "cancelled"
        self.stream.fail(failure)

    def _put(self, *, token_id: int | None, drawn: Drawn | None) -> None:
        self.stream.put(
            TokenEvent(
                seconds=time.perf_counter() - self._submitted_seconds,
                token_id=token_id,
                logprob=drawn.logprob if drawn else None,
                finish_reason=self.finish_reason,
                cached_tokens=self.num_reused,
                draft_tokens=self.num_guessed,
                accepted_draft_tokens=self.num_accepted,
            )
        )
