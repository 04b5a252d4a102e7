"""Pictures and clips as the model receives them: patches, and where they stand in a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

MediaKind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Media:
    """One picture, or the frames of one clip, cut into patches.

    `patches` [P, channels · patch · patch] is uint8, or floating and normalised already; frame by frame, within a frame
    by merge window (2 × 2 patches, row by row). `grid` counts patches: frames (1 for a picture, even for a clip), rows
    and columns. `num_tokens` is how many tokens it takes in a prompt. Equal content has an equal `digest`, and `size`
    is the width and height in pixels that it was resized to.
    """

    kind: MediaKind
    patches: Tensor
    grid: tuple[int, int, int]
    num_tokens: int
    digest: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as the model sees it."""
        patch_size = round((self.patches.shape[1] / 3) ** 0.5)
        return self.grid[2] * patch_size, self.grid[1] * patch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedMedia:
    """A picture or clip in a prompt: its `media.num_tokens` placeholders begin at token `first`."""

    first: int
    media: Media

    @property
    def end(self) -> int:
        """The first token after the placeholders."""
        return self.first + self.media.num_tokens
