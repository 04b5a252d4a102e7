"""Options that move single logits: a bias per token, and penalties on tokens already seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor


def copied(logits: Tensor) -> Tensor:
    """Return a copy of `logits` [V], for adjustments to change."""
    return torch.from_numpy(logits.numpy().copy()) if logits.device.type == "cpu" else logits.clone()


def apply_logit_bias(logits: Tensor, token_ids: Tensor, biases: Tensor) -> None:
    """Add `biases` [N] to the `logits` [V] of the distinct `token_ids` [N], in place."""
    logits.index_add_(0, token_ids, biases)


def apply_repetition_penalty(logits: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative `logits` [N] of seen tokens by `penalty`; above 1 lowers both.

    Source: Keskar et al. 2019, "CTRL", section 4.1, with the sign rule that transformers added.
    """
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def apply_presence_penalty(logits: Tensor, reply_counts: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the `logits` [N] of tokens whose `reply_counts` [N] is above 0."""
    return logits - penalty * (reply_counts > 0)


def apply_frequency_penalty(logits: Tensor, reply_counts: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` times `reply_counts` [N] from `logits` [N]."""
    return logits - penalty * reply_counts


@final
class SeenTokens:
    """The distinct tokens of prompt and reply, and how often each is in the reply.

    `token_ids` [N] (int64) and `reply_counts` [N] (float32) run parallel; tokens of the prompt alone count 0.
    """

    def __init__(self, prompt_ids: Iterable[int], device: torch.device) -> None:
        self._known = set(prompt_ids)
        self.token_ids = torch.tensor(sorted(self._known), dtype=torch.int64, device=device)
        self.reply_counts = torch.zeros(len(self._known), dtype=torch.float32, device=device)

    def add_to_reply(self, token_id: int) -> None:
        """Count one more `token_id` in the reply."""
        if token_id not in self._known:
            self._known.add(token_id)
            self.token_ids = torch.cat([self.token_ids, self.token_ids.new_tensor([token_id])])
            self.reply_counts = torch.cat([self.reply_counts, self.reply_counts.new_zeros(1)])
        self.reply_counts = self.reply_counts + (self.token_ids == token_id)
