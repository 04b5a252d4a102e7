"""A request's sampler: its options composed once, its random numbers and the tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ernie45.errors import InvalidRequestError
from ernie45.sampling.draw import greedy_token, sampled_token
from ernie45.sampling.logprobs import token_logprob
from ernie45.sampling.penalties import (
    SeenTokens,
    apply_frequency_penalty,
    apply_logit_bias,
    apply_presence_penalty,
    apply_repetition_penalty,
    copied,
)
from ernie45.sampling.speculative import RandomNumbers
from ernie45.types.requests import Sampling
from ernie45.types.results import TokenLogprob

Adjust = Callable[[Tensor], None]
Choose = Callable[[Tensor, float], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The next token, with its log-probability where the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@final
class Sampler:
    """Draws one request's tokens, one call per step, in order; `build_sampler` makes it.

    Each call counts its token as part of the reply. The logits given are never changed.
    """

    def __init__(
        self,
        *,
        num_token_ids: int,
        adjustments: Sequence[Adjust],
        choose: Choose,
        seen: SeenTokens | None,
        sampling: Sampling,
        device: torch.device,
    ) -> None:
        self._device = device
        self._num_token_ids = num_token_ids
        self._adjustments = adjustments
        self._choose = choose
        self._numbers = RandomNumbers(sampling.seed)
        self._seen = seen
        self._num_logprobs = sampling.logprobs
        self._is_plain_greedy = sampling.greedy and not adjustments and sampling.logprobs is None

    @property
    def is_plain_greedy(self) -> bool:
        """Whether a call only takes the highest logit, so that `greedy_tokens` may stand in for it."""
        return self._is_plain_greedy

    def __call__(self, logits: Tensor) -> Drawn:
        """Draw the next token from raw `logits` [V] (float32).

        Raises:
            CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
        """
        return self.take(logits, self._choose(self._adjusted(logits), self._numbers.take()))

    def guess(self, logits: Tensor, num_ahead: int) -> int:
        """What would be drawn from a draft's `logits` [V] for the token that comes `num_ahead` after the next.

        Nothing is counted, and the draws to come stay what they were. Of the tokens between, penalties know nothing.
        """
        return self._choose(self._adjusted(logits.to(self._device)), self._numbers.ahead(num_ahead))

    def take(self, logits: Tensor, token_id: int) -> Drawn:
        """Take `token_id` for the next token, as if it had been drawn from raw `logits` [V]."""
        if self._seen is not None:
            self._seen.add_to_reply(token_id)
        if self._num_logprobs is None:
            return Drawn(token_id=token_id)
        return Drawn(token_id=token_id, logprob=token_logprob(logits, token_id, self._num_logprobs))

    def _adjusted(self, logits: Tensor) -> Tensor:
        allowed = logits[: self._num_token_ids]
        if not self._adjustments:
            return allowed
        adjusted = copied(allowed)
        for adjust in self._adjustments:
            adjust(adjusted)
        return adjusted


def build_sampler(
    sampling: Sampling,
    *,
    num_token_ids: int,
    vocab_size: int,
    prompt_ids: Sequence[int],
    device: torch.device,
) -> Sampler:
    """Compose the sampler of one request.

    The order is logit_bias, repetition, presence and frequency penalty, temperature, top_k, top_p, min_p.
    Log-probabilities are those of the raw logits, before all of it.

    Args:
        num_token_ids: how many ids the tokenizer knows; higher ids are never drawn, whatever the options.
        vocab_size: V, how many logits a row holds.
        prompt_ids: the prompt, which the repetition penalty covers as well as the reply.
        device: where the logits will be.

    Raises:
        InvalidRequestError: logit_bias names a token id outside the vocabulary.
    """
    adjustments: list[Adjust] = []
    if sampling.logit_bias:
        adjustments.append(_build_bias(sampling.logit_bias, num_token_ids, vocab_size, device))
    seen = None
    if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
        seen = SeenTokens((token_id for token_id in prompt_ids if token_id < num_token_ids), device)
        adjustments.append(_build_penalties(sampling, seen))
    return Sampler(
        num_token_ids=num_token_ids,
        adjustments=adjustments,
        choose=_build_choice(sampling),
        seen=seen,
        sampling=sampling,
        device=device,
    )


def _build_bias(logit_bias: Mapping[int, float], num_token_ids: int, vocab_size: int, device: torch.device) -> Adjust:
    for token_id in logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token id {token_id}, but the vocabulary has {vocab_size} ids",
                hint=f"use ids from 0 to {vocab_size - 1}; model.tokenizer.encode(text) gives a text's ids",
            )
    biases = {token_id: bias for token_id, bias in logit_bias.items() if token_id < num_token_ids}
    token_ids = torch.tensor(list(biases), dtype=torch.int64, device=device)
    values = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
    return lambda logits: apply_logit_bias(logits, token_ids, values)


def _build_penalties(sampling: Sampling, seen: SeenTokens) -> Adjust:
    def apply_penalties(logits: Tensor) -> None:
        values = apply_repetition_penalty(logits.index_select(0, seen.token_ids), sampling.repetition_penalty)
        values = apply_presence_penalty(values, seen.reply_counts, sampling.presence_penalty)
        values = apply_frequency_penalty(values, seen.reply_counts, sampling.frequency_penalty)
        logits.index_copy_(0, seen.token_ids, values)

    return apply_penalties


def _build_choice(sampling: Sampling) -> Choose:
    if sampling.greedy:
        return lambda logits, _uniform: greedy_token(logits)
    return lambda logits, uniform: sampled_token(logits, sampling, uniform)
