"""Drawing one item of each of the tiny family's picture and clip tasks.

As in `task_items`; the media parts of the messages hold scenes, which `draw_media` turns into Pillow images once the
item is chosen. What counts for the split: a picture of one shape is its shape, colour, cell of the 3 × 3 grid, size
(small, medium or large) and background, and all pictures of an item belong to its split; a picture to count in is the
cells in use and the background; a clip is shape, colour, direction, the third of the picture it moves in, and
background. Sides in pixels, tints and exact positions do not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Final

from ernie45.testing.task_items import CHINESE_SHARE, Item, Message, split_of
from ernie45.testing.task_scenes import COLOURS, PLACES, SHAPES, Clip, Figure, Rgb, Scene, backgrounds_for

Wordings = tuple[tuple[str, ...], tuple[str, ...]]

PICTURE_KIND: Final = "picture"
TEXT_FIRST_SHARE: Final = 0.15
SEVERAL_SHARE: Final = 0.22
EARLIER_SHARE: Final = 0.15

# English and Chinese; of one picture, and of one among several.
ONE_PICTURE: Final[Mapping[str, Wordings]] = {
    "shape": (
        ("What shape is this?", "Which shape is in the picture?", "Name the shape.", "What shape is shown here?"),
        ("这是什么形状？", "图片里是什么形状？", "图形是什么形状？"),
    ),
    "colour": (
        ("What colour is this?", "What colour is the shape?", "Which colour is the shape in the picture?"),
        ("这是什么颜色？", "图形是什么颜色？", "图片里的图形是什么颜色？"),
    ),
    "place": (
        ("Where is the shape?", "Where is the {colour} {shape}?", "Where in the picture is the {shape}?"),
        ("图形在哪里？", "{colour}{shape}在哪里？", "{shape}在图片的什么位置？"),
    ),
}
NUMBERED_PICTURE: Final[Mapping[str, Wordings]] = {
    "shape": (
        ("What shape is in Picture {number}?", "Name the shape in Picture {number}."),
        ("图片{number}里是什么形状？", "图片{number}是什么形状？"),
    ),
    "colour": (
        ("What colour is the shape in Picture {number}?", "Which colour is in Picture {number}?"),
        ("图片{number}里的图形是什么颜色？", "图片{number}是什么颜色？"),
    ),
    "place": (
        ("Where is the shape in Picture {number}?", "Where in Picture {number} is the {shape}?"),
        ("图片{number}里的图形在哪里？", "图片{number}里的{shape}在哪里？"),
    ),
}
COUNT: Final[Wordings] = (
    ("How many shapes are there?", "How many shapes are in the picture?", "Count the shapes.", "How many do you see?"),
    ("有几个图形？", "图片里有几个图形？", "数一数图形。"),
)
MOTION: Final[Wordings] = (
    ("What moved, and which way?", "What moved which way?", "What happens in the video?", "Describe the motion."),
    ("什么向哪里移动了？", "视频里发生了什么？", "什么图形移动了？向哪个方向？"),
)
DIRECTIONS: Final[Mapping[str, tuple[str, int, int]]] = {
    "left": ("左", -1, 0),
    "right": ("右", 1, 0),
    "up": ("上", 0, -1),
    "down": ("下", 0, 1),
}
# Of the short side, for each size of a lone shape.
RADII: Final = {"small": (0.14, 0.16), "medium": (0.165, 0.2), "large": (0.24, 0.33)}
SMALLEST_RADIUS: Final = 11.0
SMALLEST_COUNTED: Final = 9.0
MOVING_SIDES: Final = (98, 105, 112)


def draw_media(message: Message) -> Message:
    """The message with its scenes drawn: `image` parts hold a picture, `video` parts a list of frames."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [
        part if part["type"] == "text" else {"type": part["type"], part["type"]: part[part["type"]].draw()}
        for part in content
    ]
    return {**message, "content": parts}


def draw_shape(rng: random.Random) -> Item:
    """Which shape a picture shows, of six."""
    return _about_lone_shapes(rng, "shape")


def draw_colour(rng: random.Random) -> Item:
    """Which colour the shape of a picture has, of eight."""
    return _about_lone_shapes(rng, "colour")


def draw_place(rng: random.Random) -> Item:
    """In which cell of a 3 × 3 grid the shape of a picture is."""
    return _about_lone_shapes(rng, "place")


def draw_count(rng: random.Random) -> Item:
    """How many shapes a picture shows, from 1 to 5, in different cells of a 3 × 3 grid."""
    width, height = _draw_sides(rng, least=84)
    number = rng.randint(1, 5)
    cells = sorted(rng.sample(range(9), number))
    kinds = rng.choice(("alike", "one shape", "one colour", "mixed"))
    shapes = rng.choices([*SHAPES], k=number) if kinds in ("one colour", "mixed") else [rng.choice([*SHAPES])] * number
    colours = _draw_colours(rng, number) if kinds in ("one shape", "mixed") else [rng.choice([*COLOURS])] * number
    background = rng.choice(backgrounds_for(colours))
    short = min(width, height)
    figures = []
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        x, y = _point_in_cell(rng, cell, 0.03)
        radius = max(SMALLEST_COUNTED, short * rng.uniform(0.11, 0.145))
        figures.append(Figure(shape=shape, colour=colour, rgb=_tint(rng, colour), x=x, y=y, radius=radius))
    scene = Scene(width=width, height=height, background=background, figures=tuple(figures))
    wording = rng.choice(COUNT[rng.random() < CHINESE_SHARE])
    return Item(
        content=f"cells {cells} on {background}",
        messages=(_user(rng, [scene], wording),),
        answer=str(number),
        reasoning=", ".join(str(place + 1) for place in range(number)),
    )


def draw_motion(rng: random.Random) -> Item:
    """What moved which way in a clip of 4 to 8 frames: `The red circle moved left.`"""
    shape, colour, direction = rng.choice([*SHAPES]), rng.choice([*COLOURS]), rng.choice([*DIRECTIONS])
    background = rng.choice(backgrounds_for([colour]))
    direction_zh, dx, dy = DIRECTIONS[direction]
    width, height = rng.choice(MOVING_SIDES), rng.choice(MOVING_SIDES)
    lane = rng.randrange(3)
    across = 0.2 + 0.3 * lane + rng.uniform(-0.05, 0.05)
    travel = rng.uniform(0.3, 0.6)
    begin = rng.uniform(0.17 + travel, 0.83)  # where a move to the left or up begins; the others are its mirror image
    figure_rgb = _tint(rng, colour)
    radius = min(width, height) * rng.uniform(0.14, 0.18)
    num_frames = rng.randint(4, 8)
    frames = []
    for place in range(num_frames):
        along = begin - travel * place / (num_frames - 1)
        along = along if dx + dy < 0 else 1 - along
        x, y = (along, across) if dx else (across, along)
        figure = Figure(shape=shape, colour=colour, rgb=figure_rgb, x=x, y=y, radius=radius)
        frames.append(Scene(width=width, height=height, background=background, figures=(figure,)))
    in_chinese = rng.random() < CHINESE_SHARE
    answer = f"The {colour} {shape} moved {direction}."
    if in_chinese:
        answer = f"{COLOURS[colour][0]}{SHAPES[shape]}向{direction_zh}移动了。"
    return Item(
        content=f"{colour} {shape} {direction} lane {lane} on {background}",
        messages=(_user(rng, [Clip(frames=tuple(frames))], rng.choice(MOTION[in_chinese])),),
        answer=answer,
        reasoning=f"{colour} {shape}, {direction}",
    )


class _Lone:
    """A scene of one shape, with the names of its place and size."""

    def __init__(self, rng: random.Random) -> None:
        self.shape, self.colour = rng.choice([*SHAPES]), rng.choice([*COLOURS])
        self.background = rng.choice(backgrounds_for([self.colour]))
        self.size = rng.choice([*RADII])
        cell = rng.randrange(9)
        self.place = [*PLACES][cell]
        width, height = _draw_sides(rng, least=70)
        low, high = RADII[self.size]
        radius = max(SMALLEST_RADIUS, min(width, height) * rng.uniform(low, high))
        x, y = _point_in_cell(rng, cell, 0.05)
        # A large shape is moved inwards until it is whole; its centre stays nearest to the middle of its own cell.
        x = min(max(x, radius / width), 1 - radius / width)
        y = min(max(y, radius / height), 1 - radius / height)
        figure = Figure(shape=self.shape, colour=self.colour, rgb=_tint(rng, self.colour), x=x, y=y, radius=radius)
        self.scene = Scene(width=width, height=height, background=self.background, figures=(figure,))

    @property
    def content(self) -> str:
        return f"{self.colour} {self.shape} {self.place} {self.size} on {self.background}"

    def says(self, attribute: str, in_chinese: bool) -> str:
        """The shape, colour or place in the language asked for."""
        name = str({"shape": self.shape, "colour": self.colour, "place": self.place}[attribute])
        if not in_chinese:
            return name
        return {"shape": SHAPES, "place": PLACES}[attribute][name] if attribute != "colour" else COLOURS[name][0]

    def ask(self, wording: str, in_chinese: bool, number: int = 1) -> str:
        shape, colour = self.says("shape", in_chinese), self.says("colour", in_chinese)
        return wording.format(number=number, shape=shape, colour=colour)


def _draw_lone(rng: random.Random, fits: Callable[[_Lone], bool]) -> _Lone:
    while not fits(lone := _Lone(rng)):
        pass
    return lone


def _about_lone_shapes(rng: random.Random, attribute: str) -> Item:
    """A question about the shape, colour or place of one picture's only shape."""
    in_chinese = rng.random() < CHINESE_SHARE
    # Place is asked of shapes that leave room to be in one cell.
    asked = _draw_lone(rng, lambda lone: attribute != "place" or lone.size != "large")
    form = rng.random()
    if form < SEVERAL_SHARE:
        return _among_several(rng, attribute, asked, in_chinese)
    question = asked.ask(rng.choice(ONE_PICTURE[attribute][in_chinese]), in_chinese)
    messages: tuple[Message, ...] = (_user(rng, [asked.scene], question),)
    if form < SEVERAL_SHARE + EARLIER_SHARE:
        earlier = rng.choice([name for name in ("shape", "colour") if name != attribute])
        first = asked.ask(rng.choice(ONE_PICTURE[earlier][in_chinese]), in_chinese)
        messages = (
            _user(rng, [asked.scene], first),
            {"role": "assistant", "content": asked.says(earlier, in_chinese)},
            {"role": "user", "content": question},
        )
    return Item(
        content=asked.content,
        messages=messages,
        answer=asked.says(attribute, in_chinese),
        reasoning=f"{asked.colour} {asked.shape}" + (f", {asked.place}" if attribute == "place" else ""),
    )


def _among_several(rng: random.Random, attribute: str, asked: _Lone, in_chinese: bool) -> Item:
    """The question with one or two more pictures, all of the same split; no two share what is asked for."""
    split = split_of(PICTURE_KIND, asked.content)
    value = asked.says(attribute, in_chinese)

    def fits(other: _Lone) -> bool:
        return split_of(PICTURE_KIND, other.content) == split and other.says(attribute, in_chinese) != value

    lones = [_draw_lone(rng, fits) for _ in range(rng.randint(1, 2))]
    number = rng.randint(1, len(lones) + 1)
    lones.insert(number - 1, asked)
    question = asked.ask(rng.choice(NUMBERED_PICTURE[attribute][in_chinese]), in_chinese, number)
    return Item(
        content=asked.content,
        messages=(_user(rng, [lone.scene for lone in lones], question),),
        answer=value,
        reasoning=", ".join(f"{lone.colour} {lone.shape}" for lone in lones),
    )


def _user(rng: random.Random, media: list[Scene] | list[Clip], text: str) -> Message:
    """A user's message of pictures or a clip and a question; now and then the question comes first."""
    kinds = ["video" if isinstance(item, Clip) else "image" for item in media]
    parts: list[dict[str, object]] = [{"type": kind, kind: item} for kind, item in zip(kinds, media, strict=True)]
    place = 0 if rng.random() < TEXT_FIRST_SHARE else len(parts)
    parts.insert(place, {"type": "text", "text": text})
    return {"role": "user", "content": parts}


def _draw_sides(rng: random.Random, *, least: int) -> tuple[int, int]:
    """Width and height: now and then up to 168 pixels, square one time in five, never longer than twice the short."""
    most = 168 if rng.random() < 0.12 else 112
    width = rng.randint(least, most)
    height = width if rng.random() < 0.2 else rng.randint(max(least, (width + 1) // 2), min(most, width * 2))
    return width, height


def _point_in_cell(rng: random.Random, cell: int, jitter: float) -> tuple[float, float]:
    row, column = divmod(cell, 3)
    return (column + 0.5) / 3 + rng.uniform(-jitter, jitter), (row + 0.5) / 3 + rng.uniform(-jitter, jitter)


def _draw_colours(rng: random.Random, number: int) -> list[str]:
    """Colours that share a background: black and white never together."""
    left_out = rng.choice(("black", "white"))
    return rng.choices([name for name in COLOURS if name != left_out], k=number)


def _tint(rng: random.Random, colour: str) -> Rgb:
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[colour][1])
    return red, green, blue
