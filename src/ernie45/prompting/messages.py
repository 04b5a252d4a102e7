"""Messages as a caller writes them, checked and made uniform."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie45.errors import InvalidRequestError
from ernie45.tokenizer import RESPONSE, THINK, THINK_END, split_reply
from ernie45.types.media import MediaKind
from ernie45.types.messages import Conversation

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ROLES = ("system", "user", "assistant")

_SOURCE_KEYS: Mapping[str, tuple[MediaKind, bool]] = {
    "image": ("image", False),
    "image_url": ("image", True),
    "video": ("video", False),
    "video_url": ("video", True),
}
_PART_HINT = (
    'a part is {"type": "text", "text": "…"}, {"type": "image", "image": a path, URL, bytes or picture} or '
    '{"type": "video", "video": a path, URL, bytes or frames}'
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MediaPart:
    """A picture or clip in a message. `source` is whatever the caller gave.

    `max_pixels` is the most pixels it is resized to (each frame of a clip), `fps` the frames per second of a clip that
    is given as frames; None leaves both to the defaults.
    """

    kind: MediaKind
    source: Any
    max_pixels: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.max_pixels is not None and (
            isinstance(self.max_pixels, bool) or not isinstance(self.max_pixels, int) or self.max_pixels < 1
        ):
            raise InvalidRequestError(
                f"max_pixels must be a whole number from 1, not {self.max_pixels!r}", hint="e.g. 1_003_520"
            )
        is_number = isinstance(self.fps, (int, float)) and not isinstance(self.fps, bool)
        if self.fps is not None and not (is_number and 0 < self.fps < float("inf")):
            raise InvalidRequestError(
                f"fps must be a number above 0, not {self.fps!r}", hint="frames per second of the frames that you give"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedMessage:
    """One message: its parts are texts and media, in order."""

    role: str
    parts: tuple[str | MediaPart, ...]
    thoughts: str | None = None

    @property
    def media(self) -> tuple[MediaPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, MediaPart))

    @property
    def text(self) -> str:
        """The texts of the parts, joined."""
        return "".join(part for part in self.parts if isinstance(part, str))


def check_messages(messages: Conversation) -> list[CheckedMessage]:
    """Raises InvalidRequestError: no list of messages, an unknown role, or a part that is neither text nor media."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of messages, not {type(messages).__name__}",
            hint='e.g. [{"role": "user", "content": "Hi"}]; for plain text use generate()',
        )
    if not messages:
        raise InvalidRequestError("the conversation is empty", hint='e.g. [{"role": "user", "content": "Hi"}]')
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def taken_apart(message: CheckedMessage) -> CheckedMessage:
    """An assistant's raw reply, tags and all, as thoughts and content: the template writes the tags by itself."""
    content = message.text
    if message.role != "assistant" or message.thoughts is not None:
        return message
    start = content.lstrip("\n")
    if THINK_END in content or start.startswith(THINK):
        said = split_reply(content)
    elif start.startswith(RESPONSE):
        said = split_reply(THINK_END + content)
    else:
        return message
    return CheckedMessage(role="assistant", parts=(said.text,), thoughts=said.reasoning)


def _checked_message(index: int, message: object) -> CheckedMessage:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InvalidRequestError(
            f"message {index} is not a message: {message!r:.200}", hint='write {"role": "user", "content": "…"}'
        )
    if message["role"] not in ROLES:
        raise InvalidRequestError(
            f"message {index} has the unknown role {message['role']!r}", hint=f"roles are {', '.join(ROLES)}"
        )
    unknown = sorted(str(key) for key in message if key not in ("role", "content", "thoughts"))
    if unknown:
        raise InvalidRequestError(
            f"message {index} has {', '.join(map(repr, unknown))}, which this version cannot send to a model",
            hint='a message has "role" and "content", an assistant\'s may have "thoughts"',
        )
    thoughts = message.get("thoughts")
    if thoughts is not None and (message["role"] != "assistant" or not isinstance(thoughts, str)):
        raise InvalidRequestError(
            f"message {index}, of role {message['role']!r}, has the thoughts {thoughts!r}",
            hint="thoughts are text, the reasoning of an assistant's message; leave them out elsewhere",
        )
    checked = CheckedMessage(role=message["role"], parts=_checked_parts(index, message["content"]), thoughts=thoughts)
    if checked.media and checked.role != "user":
        raise InvalidRequestError(
            f"message {index}, of role {checked.role!r}, holds media ({checked.media[0].kind})",
            hint="pictures and clips go into messages of role 'user'",
        )
    return checked


def _checked_parts(index: int, content: object) -> tuple[str | MediaPart, ...]:
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequestError(
            f"message {index}: content must be text or a list of parts, not {type(content).__name__}",
            hint='write "content": "…", or a list such as [picture, "What is this?"]',
        )
    return tuple(_checked_part(f"message {index}, part {place}", part) for place, part in enumerate(content))


def _checked_part(where: str, part: object) -> str | MediaPart:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        return _checked_dict(where, part)
    if _is_picture(part):
        return MediaPart(kind="image", source=part)
    raise InvalidRequestError(
        f"{where} is of type {type(part).__name__}, which is neither text nor media", hint=_PART_HINT
    )


def _checked_dict(where: str, part: Mapping[Any, Any]) -> str | MediaPart:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str) and set(part) == {"type", "text"}:
        return str(part["text"])
    if not isinstance(kind, str) or kind not in _SOURCE_KEYS or part.get(kind) is None:
        raise InvalidRequestError(
            f"{where} is of type {kind!r} and has the keys {sorted(map(str, part))}", hint=_PART_HINT
        )
    media_kind, is_wire_form = _SOURCE_KEYS[kind]
    known = {"type", kind, "max_pixels"} | ({"fps"} if media_kind == "video" else set())
    source, given = part[kind], set(part)
    if is_wire_form and isinstance(source, Mapping):  # OpenAI's form, perhaps with a "detail" for its own models
        given |= {f"{kind}.{key}" for key in source if key not in ("url", "detail")}
        source = source.get("url")
        if not isinstance(source, str):
            raise InvalidRequestError(
                f"{where} has no url", hint='write {"type": "image_url", "image_url": {"url": "…"}}'
            )
    unknown = sorted(str(key) for key in given - known)
    if unknown:
        raise InvalidRequestError(
            f"{where} has {', '.join(map(repr, unknown))}, which ernie45 does not know",
            hint=f"beside its type and content such a part may have {', '.join(sorted(known - {'type', kind}))}",
        )
    try:
        return MediaPart(kind=media_kind, source=source, max_pixels=part.get("max_pixels"), fps=part.get("fps"))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error.message}", hint=error.hint) from error


def _is_picture(part: object) -> TypeIs[object]:
    """Objects that can only be a picture: bytes, a path, and what Pillow, numpy and torch have."""
    if isinstance(part, (bytes, bytearray, memoryview, os.PathLike)):
        return True
    import numpy
    import torch
    from PIL import Image

    return isinstance(part, (Image.Image, numpy.ndarray, torch.Tensor))
