"""Chat messages as a caller writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

from typing_extensions import Required


class Message(TypedDict, total=False):
    """One turn of a chat: `role` is "system", "user" or "assistant"; `content` is text, or a list of parts
    such as `{"type": "text", "text": "…"}`. `thoughts` is the reasoning that led to an assistant's turn."""

    role: Required[str]
    content: Required[str | Sequence[Any]]
    thoughts: str | None


# Plain dictionaries are as welcome as typed messages.
Conversation: TypeAlias = Sequence[Message] | Sequence[Mapping[str, object]]
