"""Pictures in the engine: encoded once, kept within a limit of bytes, and put where a prompt has its placeholders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ernie45.backends.base import MediaBackend, VisionTokens
from ernie45.memory.media import frames_per_part
from ernie45.types.media import Media, PlacedMedia
from ernie45.vision import rotary_positions

CACHE_BYTES = 256 * 2**20
"""Most bytes of features kept for later prompts: about fifty photos of a 28B model at the limit that goes on a CPU."""


@final
class MediaEncoder:
    """Turns media into features [tokens, h] with the backend's vision tower, remembering what was seen last.

    Equal content (by `Media.digest`) is encoded once while the cache of `cache_bytes` has it.
    """

    def __init__(self, backend: MediaBackend, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._backend = backend
        self._cache_bytes = cache_bytes
        self._cached: OrderedDict[bytes, Tensor] = OrderedDict()
        self._num_bytes = 0

    def known(self, media: Media) -> Tensor | None:
        """The features, if they are in the cache."""
        features = self._cached.get(media.digest)
        if features is not None:
            self._cached.move_to_end(media.digest)
        return features

    def encode_part(self, media: Media, num_done: int) -> tuple[Tensor, int]:
        """Features of the next frames from number `num_done` on, and the number of frames done then.

        Between two such parts the other requests go on, and what encoding needs does not grow with the clip.
        """
        num_frames, rows, columns = media.grid
        count = min(frames_per_part(media.grid), num_frames - num_done)
        first = num_done * rows * columns
        patches = media.patches[first : first + count * rows * columns]
        return self._backend.encode(patches, (count, rows, columns)), num_done + count

    def keep(self, media: Media, features: Tensor) -> None:
        """Put features into the cache, which drops what was used longest ago."""
        num_bytes = features.numel() * features.element_size()
        if num_bytes > self._cache_bytes or media.digest in self._cached:
            return
        self._cached[media.digest] = features
        self._num_bytes += num_bytes
        while self._num_bytes > self._cache_bytes:
            _, dropped = self._cached.popitem(last=False)
            self._num_bytes -= dropped.numel() * dropped.element_size()


@final
class SequenceMedia:
    """The media of one sequence: their features as they come, and what the prompt's tokens are by them."""

    def __init__(self, placed: Sequence[PlacedMedia], *, num_prompt_tokens: int, merge_size: int) -> None:
        self._placed = placed
        self._features: list[Tensor] = []  # of the media encoded so far, in order
        self._parts: list[Tensor] = []  # of the one being encoded
        self._num_frames_done = 0
        self._rotary = rotary_positions(num_prompt_tokens, placed, merge_size=merge_size)
        self._num_prompt_tokens = num_prompt_tokens
        self._next_position = int(self._rotary.max()) + 1

    @property
    def encoded(self) -> bool:
        return len(self._features) == len(self._placed)

    def encode(self, encoder: MediaEncoder) -> bool:
        """Fetch or compute features of the next picture, or of the next part of a clip; whether any was computed."""
        media = self._placed[len(self._features)].media
        features = encoder.known(media) if not self._parts else None
        if features is not None:
            self._features.append(features)
            return False
        part, self._num_frames_done = encoder.encode_part(media, self._num_frames_done)
        self._parts.append(part)
        if self._num_frames_done == media.grid[0]:
            self._features.append(torch.cat(self._parts))
            encoder.keep(media, self._features[-1])
            self._parts, self._num_frames_done = [], 0
        return True

    def skip(self, num_tokens: int) -> None:
        """The prompt's first `num_tokens` are not run: the pictures among them, end marker included, are not needed."""
        while self._placed and self._placed[0].end < num_tokens:
            self._placed = self._placed[1:]
            if self._features:
                self._features.pop(0)
            else:
                self._parts, self._num_frames_done = [], 0

    def release(self) -> None:
        """Let go of what only the prompt needs; where the reply's tokens stand is kept."""
        self._placed, self._features = (), []
        self._rotary = self._rotary[:0]

    def positions(self, start: int, end: int) -> Tensor:
        """Rotary positions int64 [end - start, 3] of the sequence's tokens from `start` to `end`."""
        if start < self._num_prompt_tokens:
            return self._rotary[start:end]
        offset = self._next_position - self._num_prompt_tokens
        return torch.arange(start + offset, end + offset)[:, None].expand(-1, 3)

    def tokens(self, start: int, end: int, device: torch.device) -> VisionTokens | None:
        """What pictures the prompt's tokens from `start` to `end` belong to; None where all are text."""
        is_routed = torch.zeros(end - start, dtype=torch.bool)
        embedded: list[Tensor] = []
        features: list[Tensor] = []
        for item, of_item in zip(self._placed, self._features, strict=True):
            # The markers around the placeholders go with them.
            is_routed[max(0, item.first - 1 - start) : max(0, item.end + 1 - start)] = True
            first, last = max(start, item.first), min(end, item.end)
            if first < last:
                embedded.append(torch.arange(first - start, last - start))
                features.append(of_item[first - item.first : last - item.first])
        if not is_routed.any():
            return None
        empty = torch.empty(0, dtype=torch.int64)
        nothing = self._features[0][:0]
        return VisionTokens(
            text=is_routed.logical_not().nonzero()[:, 0].to(device),
            routed=is_routed.nonzero()[:, 0].to(device),
            embedded=torch.cat(embedded or [empty]).to(device),
            features=torch.cat(features or [nothing]),
        )
