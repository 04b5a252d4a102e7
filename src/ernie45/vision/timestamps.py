"""The time of a frame, written into its upper left corner as ERNIE 4.5 VL was trained."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ernie45.errors import UnsupportedError

FONT_NAME = "Roboto-Regular.ttf"
FONT_SHARE = 0.1  # of the frame's short side; and the outline's share of the font size
MIN_FONT_SIZE = 2  # smaller text is a speck, and no font loads at size 0


def time_text(seconds: float) -> str:
    """`time: HH:MM:SS.ss`, seconds rounded to hundredths."""
    return f"time: {int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}:{seconds % 3600 % 60:05.02f}"


def draw_time(frame: Image.Image, seconds: float, font: Path | None) -> Image.Image:
    """A copy of an RGB frame with its time in black on a white outline; the frame itself where it is too small.

    The font size is a tenth of the short side, the outline a tenth of that, both rounded down (Baidu's processor). With
    `font` None it is the one that Pillow has built in, Aileron: the same words at the same size, in strokes that
    differ by some pixels. An unreadable font or a Pillow without FreeType is an UnsupportedError.
    """
    size = int(min(frame.size) * FONT_SHARE)
    if size < MIN_FONT_SIZE:
        return frame
    drawn = frame.copy()
    ImageDraw.Draw(drawn).text(
        (0, 0),
        time_text(seconds),
        font=_load(font, size),
        fill=(0, 0, 0),
        stroke_width=int(size * FONT_SHARE),
        stroke_fill=(255, 255, 255),
    )
    return drawn


def _load(path: Path | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    except ImportError as error:
        raise UnsupportedError(
            "timestamps need a Pillow with FreeType, and this one was built without",
            hint="install Pillow's own wheel: pip install --force-reinstall pillow",
        ) from error
    except OSError as error:
        raise UnsupportedError(
            f"the font {path} cannot be loaded: {error}",
            hint="replace the file, or remove it to draw times in Pillow's own font",
        ) from error
