"""To which size a picture is resized: sides that are multiples of a merge window, an area within limits."""

from __future__ import annotations

import math

MAX_ASPECT = 200


def smart_resize(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Width and height to resize to, both multiples of `factor`, near the picture's own shape (Baidu's rule).

    The short side is never below `factor`, so that a very long picture can come out above `max_pixels`.
    A picture longer than 200 times its short side becomes one of just 200 to 1, as with Baidu's processors.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        short = max(factor, round(min(width, height) / factor) * factor)
        width, height = (short * MAX_ASPECT, short) if width > height else (short, short * MAX_ASPECT)
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height
