"""What is asked of a model: sampling options as a caller writes them, and the request a runner receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, TypedDict

from ernie45.errors import InvalidRequestError
from ernie45.types.media import PlacedMedia

if TYPE_CHECKING:
    import torch

MAX_LOGPROBS = 20


class SamplingOptions(TypedDict, total=False):
    """Keyword options of every generating call. Unset means the checkpoint's `generation_config.json`.

    Keys:
        temperature: 0 is greedy; above 0 divides the logits.
        top_p: keep the most likely tokens whose probabilities sum to this, 0 < top_p <= 1.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one, 0 <= min_p <= 1.
        repetition_penalty: 0.01 to 100; divides positive and multiplies negative logits of tokens in prompt or reply.
        presence_penalty: -2 to 2, subtracted once from tokens that are already in the reply.
        frequency_penalty: -2 to 2, subtracted from a token once for each time it is in the reply.
        logit_bias: token id -> value added to its logit, -100 to 100.
        seed: the same seed gives the same text, whatever else is running; unset draws one.
        max_new_tokens: longest reply in tokens, reasoning included; 512 when unset, capped by the context.
        stop: text (or texts) that end the reply; not part of it. Reasoning is not searched for it.
        stop_token_ids: further token ids that end the reply.
        logprobs: report each token's log-probability, and those of this many most likely tokens (0 to 20).
        ignore_eos: go on after end-of-reply tokens until `max_new_tokens`.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn: sampling options resolved and checked. `temperature == 0` is greedy."""

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 0.8 is the published default")
        _check("top_p", self.top_p, 0.0, 1.0, "1 keeps every token", low_open=True)
        _check_int("top_k", self.top_k, 0, None, "0 keeps every token")
        _check("min_p", self.min_p, 0.0, 1.0, "0 keeps every token")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0.01,
            100.0,
            "1 changes nothing, 1.1 discourages gently",
        )
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 changes nothing")
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 changes nothing")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError("logit_bias must map token ids to numbers", hint="e.g. logit_bias={23: -100}")
        for token_id, bias in self.logit_bias.items():
            _check_int("a logit_bias token id", token_id, 0, None, "token ids are integers from 0")
            _check(f"logit_bias[{token_id}]", bias, -100.0, 100.0, "-100 forbids a token, 100 forces it")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1, "leave it out to draw a fresh one")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, "it counts the alternatives reported per token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinkingLimit:
    """At most `max_tokens` tokens of reasoning. A reply that has so many without the token `end_token_id`, which ends
    reasoning, goes on with `closing_ids`; from there on the model is free again."""

    max_tokens: int
    end_token_id: int
    closing_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_int("thinking_budget", self.max_tokens, 0, None, "it counts tokens of reasoning; 0 goes without")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRequest:
    """One request to a runner: token ids in, token events out.

    `media` are the pictures and clips of the prompt, in its order; their tokens are placeholders.
    `max_new_tokens` is the reply's limit in tokens, `stop_token_ids` end it. With `thinking_limit` the reply begins
    with reasoning, whose length that limits. With `logit_positions` (ascending) the request scores its prompt instead:
    `on_logits` is given the float32 logits of these positions in order, [n, V] of a few at a time, on the thread that
    runs the model. It may change them, and should not keep them. Nothing is generated.
    """

    token_ids: tuple[int, ...]
    media: tuple[PlacedMedia, ...] = ()
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))
    max_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    thinking_limit: ThinkingLimit | None = None
    logit_positions: tuple[int, ...] | None = None
    on_logits: Callable[[torch.Tensor], None] | None = None


def _check(name: str, value: object, low: float, high: float, hint: str, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise InvalidRequestError(f"{name} must be a number, not {value!r}", hint=hint)
    too_low = value <= low if low_open else value < low
    if too_low or value > high or math.isinf(value):
        bounds = f"above {low:g}" if low_open else f"at least {low:g}"
        if not math.isinf(high):
            bounds += f" and at most {high:g}"
        raise InvalidRequestError(f"{name} must be {bounds}, not {value:g}", hint=hint)


def _check_int(name: str, value: object, low: int, high: int | None, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be a whole number, not {value!r}", hint=hint)
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequestError(f"{name} must be {bounds}, not {value}", hint=hint)
