"""The picture tasks: answers checked against the pixels, splits, sizes, and forms of asking."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie45.testing.task_items import Item, split_of
from ernie45.testing.task_pictures import (
    DIRECTIONS,
    PICTURE_KIND,
    draw_colour,
    draw_count,
    draw_motion,
    draw_place,
    draw_shape,
)
from ernie45.testing.task_scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, Clip, Figure, Scene, backgrounds_for
from ernie45.testing.tasks import Task, task_names, tasks

NAMES = task_names("ernie45/tiny-vl")
PICTURE_NAMES = ("shape", "colour", "count", "place")
LONE_NAMES = ("shape", "colour", "place")
DRAWERS: dict[str, Callable[[random.Random], Item]] = {
    "shape": draw_shape,
    "colour": draw_colour,
    "count": draw_count,
    "place": draw_place,
    "motion": draw_motion,
}
CHINESE = re.compile("[一-鿿]")


def draw(name: str, n: int = 40, seed: int = 7, split: str = "test") -> list[Task]:
    return tasks(name, n, seed=seed, split=split)


def parts_of(task: Task) -> list[dict[str, Any]]:
    contents = [message["content"] for message in task.messages if not isinstance(message["content"], str)]
    return [part for parts in contents for part in parts]


def pictures_of(task: Task) -> list[Image.Image]:
    return [part["image"] for part in parts_of(task) if part["type"] == "image"]


def question_of(task: Task) -> str:
    content = task.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return next(str(part["text"]) for part in content if part["type"] == "text")


def figure_pixels(image: Image.Image) -> set[tuple[int, int]]:
    """Where (x, y) the picture is not its background, the most frequent colour of its corners."""
    pixels = np.asarray(image).astype(int)
    corners = [tuple(pixels[row, column].tolist()) for row in (0, -1) for column in (0, -1)]
    ground = np.array(Counter(corners).most_common(1)[0][0])
    rows, columns = np.nonzero(np.abs(pixels - ground).sum(axis=-1) > 40)
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


def middle_of(image: Image.Image) -> tuple[float, float]:
    """The middle of the figure's bounding box as shares of the sides."""
    pixels = figure_pixels(image)
    columns, rows = zip(*pixels, strict=True)
    return (min(columns) + max(columns) + 1) / 2 / image.width, (min(rows) + max(rows) + 1) / 2 / image.height


def colour_of(image: Image.Image) -> str:
    """The name of the colour that most pixels of the figure are nearest to."""
    columns, rows = zip(*figure_pixels(image), strict=True)
    pixels = np.asarray(image).astype(int)[list(rows), list(columns)]
    palette = np.array([rgb for _, rgb in COLOURS.values()])
    nearest = ((pixels[:, None] - palette) ** 2).sum(axis=-1).argmin(axis=-1)
    return [*COLOURS][int(np.bincount(nearest).argmax())]


def count_figures(image: Image.Image) -> int:
    """How many connected groups of pixels stand out from the background."""
    left = figure_pixels(image)
    number = 0
    while left:
        edge = [left.pop()]
        number += 1
        while edge:
            x, y = edge.pop()
            near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & left
            left -= near
            edge += near
    return number


def english(word: str, names: dict[str, str]) -> str:
    return next(name for name, chinese in names.items() if word in (name, chinese))


def test_seven_tasks_of_tiny_vl() -> None:
    assert NAMES == ("shape", "colour", "count", "place", "motion", "compare", "facts")


@pytest.mark.parametrize("name", DRAWERS)
def test_same_seed_same_pictures(name: str) -> None:
    assert draw(name, 20) == draw(name, 20)
    assert draw(name, 20) != draw(name, 20, seed=8)
    assert draw(name, 3) == draw(name, 20)[:3]


@pytest.mark.parametrize("name", DRAWERS)
def test_one_item_in_eight_is_for_tests_and_none_is_shared(name: str) -> None:
    rng = random.Random(1)
    kind = PICTURE_KIND if name in LONE_NAMES else name
    contents = {DRAWERS[name](rng).content for _ in range(800)}
    share = sum(split_of(kind, content) == "test" for content in contents) / len(contents)
    assert 0.07 < share < 0.19
    drawn = {split: {str(bytes_of(task)) for task in draw(name, 50, split=split)} for split in ("train", "test")}
    assert not drawn["train"] & drawn["test"]


def bytes_of(task: Task) -> list[bytes]:
    frames = [frame for part in parts_of(task) if part["type"] == "video" for frame in part["video"]]
    return [image.tobytes() for image in (*pictures_of(task), *frames)]


def test_every_picture_of_a_test_item_is_unseen() -> None:
    def scenes(split: str, n: int) -> set[tuple[str, ...]]:
        rng = random.Random(split)
        found = set()
        for item in (DRAWERS[name](rng) for name in LONE_NAMES for _ in range(n)):
            if split_of(PICTURE_KIND, item.content) != split:
                continue
            for message in item.messages:
                parts = [] if isinstance(message["content"], str) else message["content"]
                for scene in (part["image"] for part in parts if part["type"] == "image"):
                    found.add((scene.background, *described(scene.figures[0], min(scene.width, scene.height))))
        return found

    # A large shape may stand outside of its cell, and is left out below.
    def described(figure: Figure, short: int) -> tuple[str, ...]:
        share = figure.radius / short
        size = "large" if share > 0.22 else "medium" if share > 0.1625 else "small"
        row, column = int(figure.y * 3), int(figure.x * 3)
        return figure.shape, figure.colour, [*PLACES][row * 3 + column], size

    def clear(found: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
        return {scene for scene in found if scene[-1] != "large"}

    seen, unseen = clear(scenes("train", 1500)), clear(scenes("test", 3000))
    assert len(unseen) > 150
    assert not seen & unseen


@pytest.mark.parametrize("name", DRAWERS)
def test_messages_are_ready_for_chat(name: str) -> None:
    for task in draw(name):
        assert [message["role"] for message in task.messages] in (["user"], ["user", "assistant", "user"])
        assert task.answer == task.answer.strip() != ""
        assert task.reasoning
        for part in parts_of(task):
            assert set(part) == {"type", part["type"]}
            if part["type"] == "image":
                assert part["image"].mode == "RGB"
        assert bool(CHINESE.search(task.answer)) == bool(CHINESE.search(question_of(task))) or name == "count"


@pytest.mark.parametrize("name", DRAWERS)
def test_some_prompts_are_chinese_and_some_begin_with_the_text(name: str) -> None:
    drawn = draw(name, 80)
    assert 0.1 < sum(bool(CHINESE.search(question_of(task))) for task in drawn) / 80 < 0.45
    assert 0.03 < sum(parts_of(task)[0]["type"] == "text" for task in drawn) / 80 < 0.35


def test_pictures_have_many_sizes() -> None:
    images = [image for name in PICTURE_NAMES for task in draw(name, 40) for image in pictures_of(task)]
    sides = [side for image in images for side in image.size]
    assert min(sides) >= 56
    assert max(sides) <= 168
    assert max(sides) > 120
    assert sum(image.width != image.height for image in images) > len(images) / 2
    assert sum(side % 28 != 0 for side in sides) > len(sides) / 2
    assert all(max(image.size) <= 2 * min(image.size) for image in images)


@pytest.mark.parametrize("name", LONE_NAMES)
def test_several_pictures_and_second_questions(name: str) -> None:
    drawn = draw(name, 100)
    counts = Counter(len(pictures_of(task)) for task in drawn)
    assert set(counts) == {1, 2, 3}
    earlier = [task for task in drawn if len(task.messages) == 3]
    assert len(earlier) > 5
    assert all(isinstance(task.messages[2]["content"], str) for task in earlier)
    assert all(task.messages[1]["content"] != task.answer for task in earlier)


def picture_asked_for(task: Task) -> Image.Image:
    """The picture that a question is about."""
    images = pictures_of(task)
    number = re.search(r"\d", question_of(task))
    return images[int(number.group()) - 1] if number and len(images) > 1 else images[0]


def test_places_are_where_the_shape_is() -> None:
    for task in draw("place"):
        x, y = middle_of(picture_asked_for(task))
        assert [*PLACES][int(y * 3) * 3 + int(x * 3)] == english(task.answer, dict(PLACES))


def test_colours_are_the_ones_drawn() -> None:
    chinese = {name: names[0] for name, names in COLOURS.items()}
    for task in draw("colour", 80):
        assert colour_of(picture_asked_for(task)) == english(task.answer, chinese)


def test_shapes_are_the_ones_asked_for() -> None:
    rng = random.Random(4)
    for _ in range(300):
        item = draw_shape(rng)
        content = item.messages[-1]["content"]
        if isinstance(content, str):
            (scene,) = (part["image"] for part in item.messages[0]["content"] if part["type"] == "image")
            assert english(item.answer, dict(SHAPES)) == scene.figures[0].shape
            continue
        shown = [part["image"].figures[0].shape for part in content if part["type"] == "image"]
        question = next(part["text"] for part in content if part["type"] == "text")
        number = re.search(r"\d", question)
        if item.answer[-1].isdigit():
            asked = shown[int(item.answer[-1]) - 1]
            assert asked in question or SHAPES[asked] in question
            assert shown.count(asked) == 1
        else:
            assert english(item.answer, dict(SHAPES)) == shown[int(number.group()) - 1 if number else 0]


def test_counts_are_how_many_stand_apart() -> None:
    drawn = draw("count")
    for task in drawn:
        assert task.answer == str(count_figures(pictures_of(task)[0]))
        assert task.reasoning == ", ".join(str(number) for number in range(1, int(task.answer) + 1))
    assert {task.answer for task in drawn} == set("12345")


def test_clips_show_the_motion() -> None:
    drawn = draw("motion")
    lengths = set()
    for task in drawn:
        (frames,) = (part["video"] for part in parts_of(task) if part["type"] == "video")
        lengths.add(len(frames))
        assert {frame.size for frame in frames} == {frames[0].size}
        assert all(84 <= side <= 112 for side in frames[0].size)
        (x, y), (end_x, end_y) = middle_of(frames[0]), middle_of(frames[-1])
        names = {name: (dx, dy) for name, (_, dx, dy) in DIRECTIONS.items()}
        dx, dy = (round(end_x - x, 1), round(end_y - y, 1))
        moved = next(
            name for name, (to_x, to_y) in names.items() if dx * to_x + dy * to_y > 0.2 and dx * to_y == dy * to_x
        )
        colour = colour_of(frames[0])
        if CHINESE.search(task.answer):
            assert task.answer.startswith(COLOURS[colour][0])
            assert task.answer.endswith(f"向{DIRECTIONS[moved][0]}移动了。")
        else:
            assert re.fullmatch(rf"The {colour} ({'|'.join(SHAPES)}) moved {moved}\.", task.answer)
    assert lengths == {4, 5, 6, 7, 8}


def test_shapes_and_backgrounds_can_be_told_apart() -> None:
    def picture(shape: str, colour: str, background: str) -> Image.Image:
        figure = Figure(shape=shape, colour=colour, rgb=COLOURS[colour][1], x=0.5, y=0.5, radius=8)
        return Scene(width=56, height=56, background=background, figures=(figure,)).draw()

    masks = [figure_pixels(picture(shape, "red", "paper")) for shape in SHAPES]
    for place, mask in enumerate(masks):
        assert all(len(mask ^ other) > 20 for other in masks[:place])
    for colour in COLOURS:
        for background in backgrounds_for([colour]):
            assert len(figure_pixels(picture("square", colour, background))) > 100
    assert set(backgrounds_for(["black"])).isdisjoint(backgrounds_for(["white"]))
    assert len(backgrounds_for(["red"])) == len(BACKGROUNDS)


def test_a_clip_draws_its_frames_in_order() -> None:
    figure = Figure(shape="square", colour="red", rgb=(220, 30, 35), x=0.2, y=0.5, radius=10)
    first = Scene(width=84, height=84, background="paper", figures=(figure,))
    second = Scene(width=84, height=84, background="paper", figures=())
    assert Clip(frames=(first, second)).draw() == [first.draw(), second.draw()]


def test_the_drawers_load_nothing_heavy() -> None:
    code = """
import sys, types
model = types.ModuleType("ernie45.testing.scripted")  # the one thing in ernie45.testing that needs a model
model.scripted_model = None
sys.modules["ernie45.testing.scripted"] = model
from ernie45.testing import tasks
tasks("facts", 3, seed=1, split="test")
assert not {"PIL", "torch", "numpy"} & set(sys.modules)
tasks("shape", 1, seed=1, split="test")
assert "PIL" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
