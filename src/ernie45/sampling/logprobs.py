"""Log-probabilities of a token and of the most likely ones."""

from __future__ import annotations

from torch import Tensor

from ernie45.sampling.draw import check_finite
from ernie45.sampling.filters import rank_tokens
from ernie45.types.results import TokenLogprob


def token_logprob(logits: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Return the natural-log probability of `token_id` under raw `logits` [V], and of the `num_top` best.

    Raises:
        CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
    """
    log_total = float(logits.logsumexp(0))
    check_finite(log_total)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ranked, token_ids = rank_tokens(logits, num_top)
        top = tuple(zip(token_ids.tolist(), (ranked - log_total).tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logits[token_id] - log_total), top=top)
