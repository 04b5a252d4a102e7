"""Scenes of the tiny family's picture tasks: what a picture or clip shows, and drawing it.

A scene is numbers and names alone; Pillow is imported when one is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Rgb = tuple[int, int, int]
Outline = tuple[tuple[float, float], ...]

# English name to Chinese name, and for colours to what is drawn.
SHAPES: Final[Mapping[str, str]] = {
    "circle": "圆形",
    "square": "方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "heart": "心形",
}
COLOURS: Final[Mapping[str, tuple[str, Rgb]]] = {
    "red": ("红色", (220, 30, 35)),
    "orange": ("橙色", (250, 140, 20)),
    "yellow": ("黄色", (235, 215, 25)),
    "green": ("绿色", (35, 160, 60)),
    "blue": ("蓝色", (40, 90, 225)),
    "purple": ("紫色", (145, 50, 170)),
    "black": ("黑色", (12, 12, 12)),
    "white": ("白色", (252, 252, 252)),
}
LIGHT_BACKGROUNDS: Final[Mapping[str, Rgb]] = {
    "paper": (248, 248, 248),
    "cream": (245, 235, 205),
    "silver": (200, 204, 210),
}
DARK_BACKGROUNDS: Final[Mapping[str, Rgb]] = {"slate": (75, 80, 90), "night": (18, 18, 26)}
BACKGROUNDS: Final = {**LIGHT_BACKGROUNDS, **DARK_BACKGROUNDS}
# The cells of a 3 × 3 grid, row by row.
PLACES: Final[Mapping[str, str]] = {
    "top left": "左上",
    "top centre": "上方",
    "top right": "右上",
    "middle left": "左方",
    "centre": "中间",
    "middle right": "右方",
    "bottom left": "左下",
    "bottom centre": "下方",
    "bottom right": "右下",
}
OVERSAMPLING: Final = 2


def backgrounds_for(colours: Sequence[str]) -> list[str]:
    """Names of the backgrounds on which all of these colours can be told apart."""
    names = [*BACKGROUNDS]
    if "black" in colours:
        names = [name for name in names if name in LIGHT_BACKGROUNDS]
    if "white" in colours:
        names = [name for name in names if name in DARK_BACKGROUNDS]
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One shape: its centre as shares of the width and height, its radius in pixels, and the very colour drawn."""

    shape: str
    colour: str
    rgb: Rgb
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture to draw: its sides in pixels, the name of its background, and the figures on it."""

    width: int
    height: int
    background: str
    figures: tuple[Figure, ...]

    def draw(self) -> Image:
        """The RGB picture, with smoothed edges."""
        from PIL import Image, ImageDraw

        size = (self.width * OVERSAMPLING, self.height * OVERSAMPLING)
        image = Image.new("RGB", size, BACKGROUNDS[self.background])
        canvas = ImageDraw.Draw(image)
        for figure in self.figures:
            self._draw_figure(canvas, figure)
        return image.reduce(OVERSAMPLING)

    def _draw_figure(self, canvas: ImageDraw, figure: Figure) -> None:
        radius = figure.radius * OVERSAMPLING
        x, y = figure.x * self.width * OVERSAMPLING, figure.y * self.height * OVERSAMPLING
        if figure.shape in _OUTLINES:
            points = [(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[figure.shape]]
            canvas.polygon(points, fill=figure.rgb)
            return
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=figure.rgb)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A clip to draw, frame by frame."""

    frames: tuple[Scene, ...]

    def draw(self) -> list[Image]:
        """The frames in order."""
        return [frame.draw() for frame in self.frames]


def _star() -> Outline:
    points = []
    for place in range(10):
        angle, length = math.pi * (place / 5 - 0.5), 0.42 if place % 2 else 1.05
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return tuple(points)


def _heart() -> Outline:
    points = []
    for place in range(40):
        angle = math.pi * place / 20
        y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
        points.append((math.sin(angle) ** 3, -(y + 2.5) / 15))
    return tuple(points)


def _cross() -> Outline:
    arm = 0.32
    return (
        *((-arm, -1.0), (arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm)),
        *((arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm), (-1.0, -arm), (-arm, -arm)),
    )


# Around (0, 0), with y downwards; about 1 from the centre to the furthest point.
_OUTLINES: Final[Mapping[str, Outline]] = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.98, 0.75), (-0.98, 0.75)),
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}
