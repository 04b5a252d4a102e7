"""Options that keep the most likely tokens and drop the rest.

Every filter works on tokens ranked best first and keeps a front part of them. A filter that cuts within the
first 2,048 would have cut at the same place in the whole vocabulary, so that is ranked only when none does.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie45.types.requests import Sampling

FIRST_COUNT = 2048


def rank_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of `logits` [V] and their token ids, best first, equal logits by lower id.

    Returns:
        logits [C] (float32) and token ids [C] (int64), C = min(count, V).
    """
    if logits.device.type != "cpu":
        # Adding 0 makes -0.0 the 0.0 that it equals, also to a sort that goes by bits.
        ranked, token_ids = (logits + 0.0).sort(descending=True, stable=True)
        return ranked[:count], token_ids[:count]
    row = logits.numpy()
    count = min(count, len(row))
    candidates = np.flatnonzero(row >= np.partition(row, -count)[-count])  # more where some equal the last
    # The bits of a float32, read as an integer, order as the float does once negative ones are mirrored. Negated, the
    # best come first; taken from 0.0, both zeros become 0.0. With the id below no two keys are equal, so that they have
    # one order only, and numpy's fastest way of sorting finds it.
    bits = (0.0 - row[candidates]).view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = (bits.astype(np.int64) << 32) | candidates
    keys.sort()
    best = keys[:count] & 0xFFFFFFFF
    return torch.from_numpy(row[best]), torch.from_numpy(best)


def apply_top_p(weights: NDArray[np.float64], top_p: float, total: float) -> NDArray[np.float64]:
    """Keep the shortest front part of ranked `weights` [C] that sums to at least `top_p` of `total`.

    The token that crosses the border is kept. Source: Holtzman et al. 2019, "The Curious Case of Neural Text
    Degeneration", section 3.1.
    """
    if top_p == 1:
        return weights
    border = int(np.searchsorted(weights.cumsum(), top_p * total))
    return weights[: border + 1]


def apply_min_p(weights: NDArray[np.float64], min_p: float) -> NDArray[np.float64]:
    """Keep the ranked `weights` [C] that are at least `min_p` of the first."""
    if min_p == 0:
        return weights
    return weights[: int((weights >= min_p * weights[0]).sum())]


def relative_weights(logits: Tensor, best: float, temperature: float) -> NDArray[np.float64]:
    """Return exp((logits - best) / temperature), probabilities relative to the best; float64 on the CPU.

    The choice itself is made there, so that it is the same whatever device the logits come from.
    """
    weights = logits.cpu().numpy().astype(np.float64)  # a copy, which the rest changes in place
    weights -= best
    with np.errstate(over="ignore"):  # near temperature 0 a quotient may be -inf, whose weight is 0
        weights /= temperature
    return np.exp(weights, out=weights)


def total_weight(logits: Tensor, best: float, temperature: float) -> float:
    """Return the sum of `relative_weights`; computed in float32, on their device, where the logits are not on a CPU."""
    if logits.device.type == "cpu":
        return float(relative_weights(logits, best, temperature).sum())
    return float(((logits - best) / temperature).exp_().sum())


def likely_tokens(
    logits: Tensor, best: float, sampling: Sampling, *, first_count: int = FIRST_COUNT
) -> tuple[NDArray[np.float64], Tensor]:
    """Apply temperature, top_k, top_p and min_p, in this order; top_p is a share of what top_k keeps.

    Args:
        logits: [V], the highest of them `best`.
        first_count: tokens ranked before the whole vocabulary is; changes the time, never the result.

    Returns:
        relative weights [C] (float64) and token ids [C] (int64) of the tokens kept, best first.
    """
    if sampling.top_k:
        ranked, token_ids = rank_tokens(logits, sampling.top_k)
        weights = relative_weights(ranked, best, sampling.temperature)
        kept = _apply_cuts(weights, sampling, float(weights.sum()))
        return kept, token_ids[: len(kept)]

    total = total_weight(logits, best, sampling.temperature)
    for count in (first_count, logits.numel()):
        ranked, token_ids = rank_tokens(logits, count)
        kept = _apply_cuts(relative_weights(ranked, best, sampling.temperature), sampling, total)
        if len(kept) < len(ranked):
            break
    return kept, token_ids[: len(kept)]


def _apply_cuts(weights: NDArray[np.float64], sampling: Sampling, total: float) -> NDArray[np.float64]:
    return apply_min_p(apply_top_p(weights, sampling.top_p, total), sampling.min_p)
