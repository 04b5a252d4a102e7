"""Animated pictures as clips."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image, features

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision import animation, clips
from ernie45.vision.animation import identify_animation, open_animation
from ernie45.vision.clips import Clip

needs_webp = pytest.mark.skipif(not features.check("webp"), reason="this Pillow has no WebP")
FORMATS = ["GIF", "PNG", pytest.param("WEBP", marks=needs_webp)]
COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)]
MILLISECONDS = [100, 200, 300, 400, 500, 1000]


def animated(format_name: str, *, milliseconds: list[int] | int = MILLISECONDS, noisy: bool = False) -> bytes:
    frames = [Image.new("RGB", (30, 20), colour) for colour in COLOURS]
    if noisy:
        frames = [Image.effect_noise((30, 20), 40 + number).convert("RGB") for number in range(6)]
    file = io.BytesIO()
    options = {"lossless": True} if format_name == "WEBP" else {}
    frames[0].save(file, format_name, save_all=True, append_images=frames[1:], duration=milliseconds, **options)
    return file.getvalue()


def opened(content: bytes, limits: MediaLimits | None = None) -> Clip:
    image = identify_animation(content)
    assert image is not None
    return open_animation(image, limits=limits or MediaLimits())


@pytest.mark.parametrize("format_name", FORMATS)
def test_frames_and_their_times(format_name: str) -> None:
    clip = opened(animated(format_name))
    assert list(clip.times) == pytest.approx([0, 0.1, 0.3, 0.6, 1.0, 1.5])
    assert clip.seconds == pytest.approx(2.5)
    assert clip.size == (30, 20)
    frames = list(clip.read([0, 1, 3, 5]))
    assert [frame.mode for frame in frames] == ["RGB"] * 4
    assert [frame.getpixel((9, 9)) for frame in frames] == [COLOURS[number] for number in (0, 1, 3, 5)]
    assert [frame.getpixel((9, 9)) for frame in clip.read([2])] == [COLOURS[2]]


def test_a_frame_of_no_time_lasts_a_tenth_of_a_second() -> None:
    clip = opened(animated("GIF", milliseconds=0))
    assert list(clip.times) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert clip.seconds == pytest.approx(0.6)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_pillow_picture_keeps_its_place(format_name: str) -> None:
    with Image.open(io.BytesIO(animated(format_name))) as image:
        image.seek(2)
        clip = open_animation(image, limits=MediaLimits())
        assert image.tell() == 2
        assert next(clip.read([3])).getpixel((1, 1)) == COLOURS[3]
        assert next(clip.read([4])).getpixel((1, 1)) == COLOURS[4]
        assert image.tell() == 2


def test_a_still_picture_is_a_clip_of_one_frame() -> None:
    clip = open_animation(Image.new("RGB", (30, 20), (9, 9, 9)), limits=MediaLimits())
    assert (list(clip.times), clip.seconds) == ([0.0], 0.1)
    assert [frame.getpixel((0, 0)) for frame in clip.read([0])] == [(9, 9, 9)]


@needs_webp
def test_what_is_transparent_shows_white() -> None:
    frames = [Image.new("RGBA", (30, 20), (255, 0, 0, 255)), Image.new("RGBA", (30, 20), (0, 0, 0, 0))]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert [frame.getpixel((3, 3)) for frame in opened(file.getvalue()).read([0, 1])] == [(255, 0, 0), (255, 255, 255)]


def test_other_files_are_not_animations() -> None:
    for content in (b"", b"RIFF\0\0\0\0AVI ", b"\xff\xd8\xff", b"\0\0\0\x18ftypmp42"):
        assert identify_animation(content) is None


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match="30 x 20, more than max_pixels=599"):
        opened(animated("GIF"), MediaLimits(max_pixels=599))
    monkeypatch.setattr(clips, "MAX_DECODED_PIXELS", 2 * 6 * 30 * 20 - 1)
    with pytest.raises(MediaError, match="12 frames of 30 x 20"):
        opened(animated("GIF"))
    monkeypatch.setattr(animation, "MAX_FRAMES", 5)
    with pytest.raises(MediaError, match="more than"):
        opened(animated("GIF"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_damaged_files_give_frames_or_our_error(format_name: str) -> None:
    original = animated(format_name, noisy=True)
    generator = random.Random(4)
    refused = 0
    for _ in range(60):
        content = bytearray(original[: generator.choice([len(original), generator.randrange(20, len(original))])])
        for _ in range(generator.randrange(4)):
            content[generator.randrange(12, len(content))] = generator.randrange(256)
        try:
            clip = opened(bytes(content))
            assert len(list(clip.read(range(len(clip.times))))) == len(clip.times)
        except MediaError:
            refused += 1
    assert 10 < refused < 60
