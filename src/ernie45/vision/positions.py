"""Where tokens stand for the rotary embedding: text on a line, patches in time, height and width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie45.types.media import Media, PlacedMedia


def rotary_positions(num_tokens: int, placed: Sequence[PlacedMedia], *, merge_size: int) -> Tensor:
    """Positions int64 [num_tokens, 3] of a prompt: time, height, width; `placed` in the order of the prompt.

    Text has the same number on each axis and counts on by 1. A picture or clip that begins at p has p + its place in
    its merged grid; the text after it goes on at the highest number on any axis, plus 1 (Baidu's rule; transformers
    5.23 leaves time out of that).
    """
    runs: list[Tensor] = []
    done, start = 0, 0
    for item in placed:
        num_text = item.first - done
        runs.append(_text(start, num_text))
        start += num_text
        grid = _grid(item.media, merge_size) + start
        runs.append(grid)
        start = int(grid.max()) + 1
        done = item.end
    runs.append(_text(start, num_tokens - done))
    return torch.cat(runs)


def _text(start: int, num_tokens: int) -> Tensor:
    return torch.arange(start, start + num_tokens)[:, None].expand(-1, 3)


def _grid(media: Media, merge_size: int) -> Tensor:
    """Time, height and width of each of a picture's tokens in its merged grid [num_tokens, 3]."""
    rows, columns = media.grid[1] // merge_size, media.grid[2] // merge_size
    steps = media.num_tokens // (rows * columns)
    axes = torch.meshgrid(torch.arange(steps), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(axes, dim=-1).view(-1, 3)
