"""A prompt as the model receives it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Rendered text and its token ids, exactly as sent. `text` is "" where ids were given instead of text.

    `thinking` says of a rendered conversation that it ends in an open `<think>`: the reply begins with reasoning.
    """

    text: str
    token_ids: tuple[int, ...]
    thinking: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)
