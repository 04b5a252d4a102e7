"""Options that keep the most likely tokens and drop the rest.

Every filter works on tokens ranked best first and keeps a front part of them. A filter that cuts within the
first 512 would have cut at the same place in the whole vocabulary, so that is ranked only when none does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie45.types.requests import Sampling

FIRST_COUNT = 512


def rank_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of `logits` [V] and their token ids, best first, equal logits by lower id.

    Returns:
        logits [C] and token ids [C] (int64), C = min(count, V).
    """
    # Beyond a fraction of the vocabulary, selecting and then ordering costs more than ordering everything.
    if count > logits.numel() // 8:
        order = _descending_order(logits)[:count]
        return logits[order], order
    best, token_ids = logits.topk(count + 1)
    border = best[count]
    if best[count - 1] == border:
        # topk picks any of the equal logits at its border; take the lower ids.
        above = token_ids[best > border]
        equal = (logits == border).nonzero()[:, 0][: count - above.numel()]
        token_ids = torch.cat([above, equal])
    else:
        token_ids = token_ids[:count]
    token_ids = token_ids.sort().values
    ranked, order = logits[token_ids].sort(descending=True, stable=True)
    return ranked, token_ids[order]


def _descending_order(logits: Tensor) -> Tensor:
    # The bits of a float32, read as an integer, order as the float does once negative ones are mirrored, and
    # torch sorts integers by radix on x86 CPUs: three times as fast. Adding 0 gives -0.0 the bits of 0.0.
    bits = (logits + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ascending.bitwise_not().sort(stable=True).indices


def apply_top_p(weights: Tensor, top_p: float, total_weight: float) -> Tensor:
    """Keep the shortest front part of ranked `weights` [C] that sums to at least `top_p` of `total_weight`.

    The token that crosses the border is kept. Source: Holtzman et al. 2019, "The Curious Case of Neural Text
    Degeneration", section 3.1.
    """
    if top_p == 1:
        return weights
    border = int(torch.searchsorted(weights.cumsum(0), top_p * total_weight))
    return weights[: border + 1]


def apply_min_p(weights: Tensor, min_p: float) -> Tensor:
    """Keep the ranked `weights` [C] that are at least `min_p` of the first."""
    if min_p == 0:
        return weights
    return weights[: int((weights >= min_p * weights[0]).sum())]


def relative_weights(logits: Tensor, best: float, temperature: float) -> Tensor:
    """Return exp((logits - best) / temperature), probabilities relative to the best; float64 on the CPU.

    The choice itself is made there, so that it is the same whatever device the logits come from.
    """
    return (logits.cpu().double() - best).div_(temperature).exp_()


def likely_tokens(
    logits: Tensor, best: float, sampling: Sampling, *, first_count: int = FIRST_COUNT
) -> tuple[Tensor, Tensor]:
    """Apply temperature, top_k, top_p and min_p, in this order; top_p is a share of what top_k keeps.

    Args:
        logits: [V], the highest of them `best`.
        first_count: tokens ranked before the whole vocabulary is; changes the time, never the result.

    Returns:
        relative weights [C] (float64, CPU) and token ids [C] of the tokens kept, best first.
    """
    if sampling.top_k:
        ranked, token_ids = rank_tokens(logits, sampling.top_k)
        weights = relative_weights(ranked, best, sampling.temperature)
        kept = _apply_cuts(weights, sampling, float(weights.sum()))
        return kept, token_ids[: kept.numel()]

    total_weight = _total_weight(logits, best, sampling.temperature)
    for count in (first_count, logits.numel()):
        ranked, token_ids = rank_tokens(logits, count)
        kept = _apply_cuts(relative_weights(ranked, best, sampling.temperature), sampling, total_weight)
        if kept.numel() < ranked.numel():
            break
    return kept, token_ids[: kept.numel()]


def _apply_cuts(weights: Tensor, sampling: Sampling, total_weight: float) -> Tensor:
    return apply_min_p(apply_top_p(weights, sampling.top_p, total_weight), sampling.min_p)


def _total_weight(logits: Tensor, best: float, temperature: float) -> float:
    return float(((logits - best) / temperature).exp_().sum())
