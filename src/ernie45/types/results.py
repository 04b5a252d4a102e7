"""What a model gives back: token events from a runner, chunks of a stream, whole completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ernie45.types.messages import Message

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one generated token in the model's raw distribution (before any option).

    `top` holds the `logprobs=` most likely (token id, log-probability) pairs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One step of one request: a token, the end, or both. `seconds` counts from the request's submission, and
    `cached_tokens` of its prompt were taken over from other requests. So far `draft_tokens` were guessed,
    `accepted_draft_tokens` of them rightly. A scoring request has but one event, its end.
    """

    seconds: float = 0.0
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What one reply cost. Of `prompt_tokens`, `cached_tokens` were not computed but taken over from other requests
    that begin alike. With `draft=`, `draft_tokens` were guessed, of which `accepted_draft_tokens` were right and came
    without a step of their own. Seconds count from submission; `tokens_per_second` is that of the tokens after the
    first."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    tokens_per_second: float | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionChunk:
    """What one step added. `text` is empty while it is held back; `finish_reason` and `usage` come at the end."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole reply. `str(completion)` is its text."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call of a tool that the model asks for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatChunk:
    """What one step added to a chat reply: answer text, and reasoning apart from it."""

    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCompletion:
    """A whole chat reply: `text` is the answer, `reasoning` what led to it (None where the model was not asked to
    think), `message` what to append to the history."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.text}
        if self.reasoning is not None:
            message["thoughts"] = self.reasoning
        return message

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How likely a text is. `logprobs[i]` is the natural-log probability of `token_ids[i + 1]` after those before it;
    the first token has none. `perplexity` = exp(-mean(logprobs))."""

    token_ids: tuple[int, ...]
    logprobs: Sequence[float]
    perplexity: float
