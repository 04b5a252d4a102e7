"""Messages as callers write them: every form of a part, and what is wrong with each wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ernie45.errors import InvalidRequestError
from ernie45.prompting.messages import MediaPart, check_messages

PICTURE = Image.new("RGB", (4, 4))
FRAMES = [PICTURE, PICTURE]


def part_of(part: Any) -> MediaPart:
    (message,) = check_messages([{"role": "user", "content": [part]}])
    (checked,) = message.parts
    assert isinstance(checked, MediaPart)
    assert message.media == (checked,)
    return checked


def error_of(content: Any, role: str = "user") -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_messages([{"role": "user", "content": "hi"}, {"role": role, "content": content}])
    assert caught.value.hint
    assert caught.value.message.startswith("message 1")
    return caught.value


@pytest.mark.parametrize(
    "source",
    [PICTURE, b"bytes", bytearray(b"bytes"), memoryview(b"b"), Path("cat.png"), np.zeros((4, 4)), torch.zeros(3, 4, 4)],
    ids=lambda source: type(source).__name__,
)
def test_a_plain_object_is_a_picture(source: Any) -> None:
    for part in (source, {"type": "image", "image": source}):
        checked = part_of(part)
        assert (checked.kind, checked.max_pixels, checked.fps) == ("image", None, None)
        assert checked.source is source


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        ({"type": "image", "image": "cat.png"}, "image", "cat.png"),
        ({"type": "image_url", "image_url": "https://a.b/c.png"}, "image", "https://a.b/c.png"),
        ({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}, "image", "https://a.b/c.png"),
        ({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}, "image", "data:,"),
        ({"type": "image_url", "image_url": PICTURE}, "image", PICTURE),
        ({"type": "video", "video": "clip.mp4"}, "video", "clip.mp4"),
        ({"type": "video", "video": FRAMES}, "video", FRAMES),
        ({"type": "video_url", "video_url": "https://a.b/c.mp4"}, "video", "https://a.b/c.mp4"),
        (
            {"type": "video_url", "video_url": {"url": "https://a.b/c.mp4", "detail": "high"}},
            "video",
            "https://a.b/c.mp4",
        ),
    ],
)
def test_parts_of_every_name(part: dict[str, Any], kind: str, source: Any) -> None:
    checked = part_of(part)
    assert (checked.kind, checked.max_pixels, checked.fps) == (kind, None, None)
    assert checked.source is source


def test_a_part_may_set_its_own_limit_and_a_clip_its_rate() -> None:
    assert part_of({"type": "image", "image": PICTURE, "max_pixels": 784}).max_pixels == 784
    assert part_of({"type": "image_url", "image_url": {"url": "x"}, "max_pixels": 784}).max_pixels == 784
    clip = part_of({"type": "video", "video": FRAMES, "max_pixels": 1568, "fps": 0.5})
    assert (clip.max_pixels, clip.fps) == (1568, 0.5)


def test_texts_and_media_stay_in_order() -> None:
    content = ["a", PICTURE, {"type": "text", "text": "b"}, {"type": "video", "video": "c.mp4"}, ""]
    (message,) = check_messages([{"role": "user", "content": content}])
    kinds = [part if isinstance(part, str) else part.kind for part in message.parts]
    assert kinds == ["a", "image", "b", "video", ""]
    assert message.text == "ab"
    assert [part.kind for part in message.media] == ["image", "video"]
    (same,) = check_messages([{"role": "user", "content": tuple(content)}])
    assert same.text == "ab"


@pytest.mark.parametrize("content", [None, 5, PICTURE, b"bytes", {"type": "text", "text": "hi"}, {"a"}, iter(["hi"])])
def test_content_is_text_or_a_list_of_parts(content: Any) -> None:
    assert "content must be text or a list of parts" in error_of(content).message


@pytest.mark.parametrize("part", [None, 5, 1.5, True, ["a"], ("a",), object()])
def test_a_part_of_another_type(part: Any) -> None:
    assert f"message 1, part 1 is of type {type(part).__name__}" in error_of(["hi", part]).message


@pytest.mark.parametrize(
    "part",
    [
        {},
        {"type": "image"},
        {"image": PICTURE},
        {"type": "image", "image": None},
        {"type": "image", "image_url": "x"},
        {"type": "picture", "picture": PICTURE},
        {"type": "audio", "audio": b""},
        {"type": 5, "image": PICTURE},
        {"type": ["image"], "image": PICTURE},
        {"type": "text"},
        {"type": "text", "text": 5},
        {"type": "text", "text": "hi", "cache_control": {}},
    ],
)
def test_a_dictionary_that_is_no_part(part: dict[str, Any]) -> None:
    error = error_of([part])
    assert "message 1, part 0 is of type" in error.message
    assert '{"type": "image"' in error.hint


@pytest.mark.parametrize("url", [{}, {"url": None}, {"url": b"x"}, {"detail": "low"}])
def test_a_url_part_without_a_url(url: dict[str, Any]) -> None:
    assert "message 1, part 0 has no url" in error_of([{"type": "image_url", "image_url": url}]).message


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ({"type": "image", "image": PICTURE, "detail": "low"}, "'detail'"),
        ({"type": "image", "image": PICTURE, "fps": 2}, "'fps'"),
        ({"type": "image", "image": PICTURE, "min_pixels": 4, "alt": "cat"}, "'alt', 'min_pixels'"),
        ({"type": "video", "video": FRAMES, "image": PICTURE}, "'image'"),
        ({"type": "image_url", "image_url": {"url": "x", "max_pixels": 4}}, "'image_url.max_pixels'"),
        ({"type": "image_url", "image_url": {"url": "x"}, "detail": "low"}, "'detail'"),
    ],
)
def test_what_a_part_holds_beside_is_not_dropped_unseen(part: dict[str, Any], shown: str) -> None:
    error = error_of([part])
    assert f"part 0 has {shown}, which ernie45 does not know" in error.message
    assert "max_pixels" in error.hint


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "784"])
def test_a_limit_of_pixels_is_a_whole_number(value: Any) -> None:
    error = error_of(["hi", {"type": "image", "image": PICTURE, "max_pixels": value}])
    assert f"message 1, part 1: max_pixels must be a whole number from 1, not {value!r}" in error.message


@pytest.mark.parametrize("value", [0, -2.0, True, "2", float("inf"), float("nan")])
def test_a_rate_is_a_number_above_0(value: Any) -> None:
    error = error_of([{"type": "video", "video": FRAMES, "fps": value}])
    assert f"message 1, part 0: fps must be a number above 0, not {value!r}" in error.message


@pytest.mark.parametrize("role", ["assistant", "system"])
@pytest.mark.parametrize(("part", "kind"), [(PICTURE, "image"), ({"type": "video", "video": "a.mp4"}, "video")])
def test_media_stand_in_messages_of_the_user(role: str, part: Any, kind: str) -> None:
    assert f"of role {role!r}, holds media ({kind})" in error_of(["see", part], role).message
