"""Log-probabilities of a token and of the most likely ones."""

from __future__ import annotations

import math

from torch import Tensor

from ernie45.sampling.draw import highest_logit
from ernie45.sampling.filters import rank_tokens, total_weight
from ernie45.types.results import TokenLogprob


def token_logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Return the natural-log probability of `token_id` under raw `logits` [V], and of the `num_top` best.

    Raises:
        CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
    """
    best = highest_logit(logits)
    log_total = best + math.log(total_weight(logits, best, 1.0))
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ranked, token_ids = rank_tokens(logits, num_top)
        logprobs = [logit - log_total for logit in ranked.tolist()]
        top = tuple(zip(token_ids.tolist(), logprobs, strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logits[token_id]) - log_total, top=top)
