"""A prompt as the model receives it."""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.errors import InvalidRequestError
from ernie45.types.media import PlacedMedia


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Rendered text and its token ids, exactly as sent. `text` is "" where ids were given instead of text.

    `thinking` says of a rendered conversation that it ends in an open `<think>`: the reply begins with reasoning.
    `media` are its pictures and clips in order. Each has `num_tokens` placeholders in `token_ids`, between a start and
    an end marker, and one in `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking: bool = False
    media: tuple[PlacedMedia, ...] = ()

    def __post_init__(self) -> None:
        done = 0
        for item in self.media:
            if item.first <= done or item.end >= len(self.token_ids):
                raise InvalidRequestError(
                    f"a {item.media.kind} of {item.media.num_tokens} tokens stands at {item.first} of a prompt of"
                    f" {len(self.token_ids)} tokens",
                    hint="media stand in order, each between a start and an end marker",
                )
            done = item.end

    def __len__(self) -> int:
        return len(self.token_ids)
