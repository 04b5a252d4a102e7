"""The time written on a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from ernie45.errors import UnsupportedError
from ernie45.vision.timestamps import draw_time, time_text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "time: 00:00:00.00"),
        (0.5, "time: 00:00:00.50"),
        (7.0416, "time: 00:00:07.04"),
        (59.994, "time: 00:00:59.99"),
        (59.999, "time: 00:00:60.00"),  # rounded last, as published
        (61.5, "time: 00:01:01.50"),
        (3600.0, "time: 01:00:00.00"),
        (45296.789, "time: 12:34:56.79"),
    ],
)
def test_time_text(seconds: float, expected: str) -> None:
    assert time_text(seconds) == expected


def test_black_on_a_white_outline_in_the_upper_left_corner() -> None:
    frame = Image.new("RGB", (400, 300), (0, 0, 255))
    drawn = np.asarray(draw_time(frame, 1.5, None))
    assert np.asarray(frame).reshape(-1, 3).max(0).tolist() == [0, 0, 255], "the frame given was drawn on"
    changed = (drawn != np.asarray(frame)).any(-1)
    assert changed[:36].any()  # 30 pixels of text with an outline of 3 below
    assert not changed[45:].any()
    assert changed[:, :20].any()
    for colour in ((0, 0, 0), (255, 255, 255)):
        assert (drawn == colour).all(-1).sum() > 200


def test_drawn_as_published_with_a_font_file(tmp_path: Path) -> None:
    path = tmp_path / "Roboto-Regular.ttf"
    path.write_bytes(_font_bytes())
    frame = Image.effect_noise((320, 240), 60).convert("RGB")
    expected = frame.copy()
    ImageDraw.Draw(expected).text(
        (0, 0),
        "time: 00:00:03.00",
        font=ImageFont.truetype(path, 24),
        fill=(0, 0, 0),
        stroke_width=2,
        stroke_fill=(255, 255, 255),
    )
    assert draw_time(frame, 3.0, path).tobytes() == expected.tobytes()
    assert draw_time(frame, 3.0, path).tobytes() != frame.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (9, 500), (500, 19)])
def test_a_frame_too_small_for_text_stays_as_it_is(size: tuple[int, int]) -> None:
    frame = Image.new("RGB", size, (9, 8, 7))
    assert draw_time(frame, 3.0, None) is frame


@pytest.mark.parametrize("side", [20, 21, 99, 100])
def test_the_smallest_text(side: int) -> None:
    assert draw_time(Image.new("RGB", (side, side)), 3.0, None).size == (side, side)


def test_a_font_that_cannot_be_loaded(tmp_path: Path) -> None:
    frame = Image.new("RGB", (100, 100))
    with pytest.raises(UnsupportedError, match=r"gone\.ttf"):
        draw_time(frame, 0.0, tmp_path / "gone.ttf")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(UnsupportedError, match=r"broken\.ttf"):
        draw_time(frame, 0.0, broken)


def test_a_pillow_without_freetype(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(size: float) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", missing)
    with pytest.raises(UnsupportedError, match="FreeType"):
        draw_time(Image.new("RGB", (100, 100)), 0.0, None)


def _font_bytes() -> bytes:
    """A font file: the one inside Pillow."""
    assert features.check("freetype2")
    font = ImageFont.load_default(10)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font.font_bytes
