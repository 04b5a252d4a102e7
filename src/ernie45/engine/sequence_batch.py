"""What sequences have to run next, put together as the batch of one step."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ernie45.backends.base import Batch, VisionTokens
from ernie45.backends.kv_cache import KVCache
from ernie45.engine.batches import Run, text_batch
from ernie45.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The tokens that a sequence runs after those that lie in its slot. `wanted` says after which of them logits are,
    the first being 0."""

    sequence: Sequence
    token_ids: Tokens[int]
    wanted: Tokens[int]


def sequence_batch(parts: Tokens[Part], cache: KVCache, device: torch.device) -> Batch:
    """The parts one after the other, on `device`. Decoding sequences run together, a prompt by itself."""
    runs = []
    for part in parts:
        assert part.sequence.slot is not None
        runs.append(
            Run(
                slot=part.sequence.slot,
                start=part.sequence.num_cached,
                token_ids=part.token_ids,
                wanted=part.wanted,
            )
        )
    return replace(
        text_batch(runs, cache, device),
        rotary_positions=_rotary_positions(parts, device),
        vision=_vision_tokens(parts, device),
    )


def _rotary_positions(parts: Tokens[Part], device: torch.device) -> Tensor | None:
    if all(part.sequence.media is None for part in parts):
        return None
    runs = []
    for part in parts:
        media, start = part.sequence.media, part.sequence.num_cached
        end = start + len(part.token_ids)
        if media is None:
            runs.append(torch.arange(start, end)[:, None].expand(-1, 3))
        else:
            runs.append(media.positions(start, end))
    return torch.cat(runs).to(device)


def _vision_tokens(parts: Tokens[Part], device: torch.device) -> VisionTokens | None:
    """Only prompts have pictures; generated tokens are text."""
    sequence, num_tokens = parts[0].sequence, len(parts[0].token_ids)
    if sequence.media is None or not sequence.in_prefill:
        return None
    return sequence.media.tokens(sequence.num_cached, sequence.num_cached + num_tokens, device)
