"""One token from logits: the most likely one, or one drawn by chance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ernie45.errors import CorruptFileError
from ernie45.sampling.filters import likely_tokens, relative_weights
from ernie45.types.requests import Sampling


def check_finite(value: float) -> None:
    """Check the maximum or log-sum of logits, which is finite only where they can be used.

    Raises:
        CorruptFileError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise CorruptFileError(
            f"the model's logits are not finite (found {value})",
            hint="load with dtype='float32' in case a narrower type overflows; if that does not help, "
            "the weight files are damaged: download them again",
        )


def highest_logit(logits: Tensor) -> float:
    """Return the highest of `logits` [V].

    Raises:
        CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
    """
    best = float(logits.numpy().max() if logits.device.type == "cpu" else logits.amax())  # NaN where there is one
    check_finite(best)
    return best


def greedy_token(logits: Tensor) -> int:
    """Return the id of the highest of `logits` [V], the lowest id among equals.

    Raises:
        CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
    """
    token_id = int(logits.argmax())
    check_finite(float(logits[token_id]))  # argmax takes NaN for the highest
    return token_id


class Best(NamedTuple):
    """The highest logit of a row and whose it is."""

    token_id: int
    logit: float


def greedy_tokens(logits: Tensor, num_token_ids: int) -> list[Best]:
    """Return the highest of each row of `logits` [B, V] at once, among the first `num_token_ids` ids.

    For rows whose sampler says `is_plain_greedy`: many rows share one pass, or one wait for a device.
    The caller puts each `logit` through `check_finite`, so that one bad row is its own affair.
    """
    allowed = logits[:, :num_token_ids]
    if allowed.device.type == "cpu":
        rows = allowed.numpy()
        return [Best(int(best), float(row[best])) for row, best in zip(rows, rows.argmax(axis=1), strict=True)]
    best = allowed.max(dim=-1)
    return [Best(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def sampled_token(logits: Tensor, sampling: Sampling, uniform: float) -> int:
    """Draw an id from `logits` [V] under temperature, top_k, top_p and min_p.

    Args:
        uniform: random number, 0 <= uniform < 1; the same number picks the same token.

    Raises:
        CorruptFileError: the logits hold NaN or +inf, or nothing but -inf.
    """
    best = highest_logit(logits)
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        return _inverse_cdf(relative_weights(logits, best, sampling.temperature), uniform)
    weights, token_ids = likely_tokens(logits, best, sampling)
    return int(token_ids[_inverse_cdf(weights, uniform)])


def _inverse_cdf(weights: NDArray[np.float64], uniform: float) -> int:
    cumulative = weights.cumsum()
    # side="right" steps over tokens of weight 0, also where uniform is 0.
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
