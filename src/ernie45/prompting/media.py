"""Pictures and clips of a conversation: prepared for the model, and put into its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie45.errors import InvalidRequestError, TemplateError, TokenizerError
from ernie45.prompting.messages import CheckedMessage, MediaPart
from ernie45.tokenizer import Tokenizer
from ernie45.types.limits import MediaLimits
from ernie45.types.media import Media, MediaKind, PlacedMedia
from ernie45.types.prompts import Prompt
from ernie45.vision import VisionSettings, open_image, prepare_image, prepare_video

# What templates write where a picture or clip stands; the start and end markers around it are tokens of their own.
_PLACEHOLDERS: dict[str, MediaKind] = {
    "<|IMAGE_PLACEHOLDER|>": "image",
    "<|image@placeholder|>": "image",
    "<|VIDEO_PLACEHOLDER|>": "video",
    "<|video@placeholder|>": "video",
}
_MARKERS: dict[MediaKind, tuple[str, str]] = {
    "image": ("<|IMAGE_START|>", "<|IMAGE_END|>"),
    "video": ("<|VIDEO_START|>", "<|VIDEO_END|>"),
}
_NUMBERED: dict[MediaKind, str] = {"image": "Picture", "video": "Video"}
_PLACEHOLDER = re.compile("|".join(map(re.escape, _PLACEHOLDERS)))
_RESERVED = re.compile("|".join(map(re.escape, (*_PLACEHOLDERS, *_MARKERS["image"], *_MARKERS["video"]))))


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaTokens:
    """The ids that stand for media in a prompt. Their numbers differ between checkpoints; their names do not."""

    placeholders: dict[MediaKind, int]
    markers: dict[MediaKind, tuple[int, int]]

    @staticmethod
    def of(tokenizer: Tokenizer) -> MediaTokens:
        """Look them up by name. Raises TokenizerError where the tokenizer lacks one.

        Baidu's checkpoints have one placeholder for pictures and clips, transformers' form has a second for clips.
        """
        image = _id_of(tokenizer, "<|IMAGE_PLACEHOLDER|>")
        video = tokenizer.token_id("<|VIDEO_PLACEHOLDER|>")
        return MediaTokens(
            placeholders={"image": image, "video": image if video is None else video},
            markers={
                kind: (_id_of(tokenizer, start), _id_of(tokenizer, end)) for kind, (start, end) in _MARKERS.items()
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionInput:
    """How one model takes pictures and clips.

    `max_pixels` and `max_frame_pixels` are the most pixels of a picture, or a frame, where a part does not say.
    """

    settings: VisionSettings
    max_pixels: int
    max_frame_pixels: int
    limits: MediaLimits
    font: Path | None = None

    def prepare(self, part: MediaPart) -> Media:
        """Open a picture or clip and cut it into patches. Raises MediaError."""
        if part.kind == "image":
            image = open_image(part.source, limits=self.limits)
            return prepare_image(image, self.settings, max_pixels=self.max_pixels_of(part))
        return prepare_video(
            part.source,
            self.settings,
            limits=self.limits,
            fps=part.fps,
            font=self.font,
            max_pixels=self.max_pixels_of(part),
        )

    def max_pixels_of(self, part: MediaPart) -> int:
        """The limit that goes for a part."""
        return part.max_pixels or (self.max_pixels if part.kind == "image" else self.max_frame_pixels)


def check_texts(messages: Sequence[CheckedMessage]) -> None:
    """Raise InvalidRequestError where a text holds a marker of media: the prompt would have more of them than media."""
    for index, message in enumerate(messages):
        check_text(message.text, f"the text of message {index}")
        check_text(message.thoughts or "", f"the text of message {index}")


def check_text(text: str, what: str) -> None:
    """Raise InvalidRequestError where a text holds a marker of media; `what` is its name in the message."""
    found = _RESERVED.search(text)
    if found:
        raise InvalidRequestError(
            f"{what} holds {found[0]!r}, which marks pictures and clips in a prompt",
            hint="leave it out: give a picture to chat() as a part of its own, such as {'type': 'image', 'image': …}",
        )


def check_placeholders(prompt: Prompt, tokens: MediaTokens) -> None:
    """Raise InvalidRequestError where ids stand for media that the prompt does not hold: nothing would be seen."""
    of_media = {place for item in prompt.media for place in range(item.first, item.end)}
    reserved = set(tokens.placeholders.values())
    for place, token_id in enumerate(prompt.token_ids):
        if token_id in reserved and place not in of_media:
            raise InvalidRequestError(
                f"token {place} of the prompt, id {token_id}, stands for a picture or clip, and none is given",
                hint="pass on what render() gives, not its ids or text alone",
            )


def flattened(messages: Sequence[CheckedMessage]) -> list[str]:
    """Each message's content as text, with numbered markers for media, as the published templates write them."""
    contents = []
    counts: dict[MediaKind, int] = {"image": 0, "video": 0}
    for message in messages:
        texts = []
        for part in message.parts:
            if isinstance(part, str):
                texts.append(part)
                continue
            counts[part.kind] += 1
            start, end = _MARKERS[part.kind]
            placeholder = next(text for text, kind in _PLACEHOLDERS.items() if kind == part.kind)
            texts.append(f"{_NUMBERED[part.kind]} {counts[part.kind]}:{start}{placeholder}{end}")
        contents.append("".join(texts))
    return contents


def fits(text: str, kinds: Sequence[MediaKind]) -> bool:
    """Whether a rendered prompt has placeholders for just these media, in order."""
    return [_PLACEHOLDERS[found] for found in _PLACEHOLDER.findall(text)] == list(kinds)


def place_media(
    text: str, media: Sequence[Media], tokenizer: Tokenizer, tokens: MediaTokens
) -> tuple[tuple[int, ...], tuple[PlacedMedia, ...]]:
    """Encode a rendered prompt, with as many placeholder ids for each picture or clip as it has tokens.

    Raises:
        TemplateError: a placeholder does not stand between its start and end markers.
    """
    ids: list[int] = []
    placed: list[PlacedMedia] = []
    texts = _PLACEHOLDER.split(text)
    for piece, item in zip(texts, media, strict=False):
        ids += tokenizer.encode(piece)
        if not ids or ids[-1] != tokens.markers[item.kind][0]:
            raise _unmarked(item.kind)
        placed.append(PlacedMedia(first=len(ids), media=item))
        ids += [tokens.placeholders[item.kind]] * item.num_tokens
    ids += tokenizer.encode(texts[-1])
    for place in placed:
        if ids[place.end : place.end + 1] != [tokens.markers[place.media.kind][1]]:
            raise _unmarked(place.media.kind)
    return tuple(ids), tuple(placed)


def _unmarked(kind: MediaKind) -> TemplateError:
    start, end = _MARKERS[kind]
    return TemplateError(
        f"the chat template puts a {kind} elsewhere than between {start} and {end}",
        hint="use the template of the published checkpoint",
    )


def _id_of(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.token_id(name)
    if token_id is None:
        raise TokenizerError(
            f"the tokenizer has no token {name!r}, which marks pictures and clips in a prompt",
            hint="fetch the checkpoint's tokenizer files again: a vision-language model comes with this token",
        )
    return token_id
