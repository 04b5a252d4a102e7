"""Positions of text and media, worked out by hand from Baidu's rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ernie45.types.media import Media, PlacedMedia
from ernie45.vision import rotary_positions


def placed(first: int, *grid: int) -> PlacedMedia:
    frames, rows, columns = grid
    kind: Any = "image" if frames == 1 else "video"
    num_tokens = rows * columns // 4 * (1 if frames == 1 else frames // 2)
    patches = torch.empty(0, 588)
    media = Media(kind=kind, patches=patches, grid=(frames, rows, columns), num_tokens=num_tokens, digest=b"")
    return PlacedMedia(first=first, media=media)


def positions(num_tokens: int, *items: PlacedMedia) -> list[list[int]]:
    found = rotary_positions(num_tokens, items, merge_size=2)
    assert found.dtype == torch.int64
    return found.tolist()


def line(first: int, last: int) -> list[list[int]]:
    return [[place] * 3 for place in range(first, last + 1)]


def test_text_counts_on() -> None:
    assert positions(4) == line(0, 3)


def test_a_picture_has_one_time_and_its_rows_and_columns() -> None:
    grid = [[3, 3, 3], [3, 3, 4], [3, 3, 5], [3, 4, 3], [3, 4, 4], [3, 4, 5]]
    # 2 x 3 tokens from 3 on: the text goes on after column 5.
    assert positions(11, placed(3, 1, 4, 6)) == [*line(0, 2), *grid, *line(6, 7)]


def test_a_tall_picture_goes_by_its_rows() -> None:
    grid = [[1, row, 1] for row in range(1, 6)]
    assert positions(8, placed(1, 1, 10, 2)) == [*line(0, 0), *grid, *line(6, 7)]


@pytest.mark.parametrize("items", [1, 3])
def test_each_picture_begins_after_the_one_before(items: int) -> None:
    # A marker, one token, a marker: each picture of one token takes one place, like the markers.
    pictures = [placed(1 + 3 * number, 1, 2, 2) for number in range(items)]
    assert positions(3 * items, *pictures) == line(0, 3 * items - 1)


def test_a_clip_counts_pairs_of_frames() -> None:
    grid = [[2 + step, 2, 2 + column] for step in range(2) for column in range(3)]
    assert positions(9, placed(2, 4, 2, 6)) == [*line(0, 1), *grid, *line(5, 5)]


def test_after_a_clip_longer_than_wide_the_text_goes_on_after_its_time() -> None:
    grid = [[1 + step, 1, 1 + column] for step in range(5) for column in range(2)]
    # Its columns end at 2, its time at 5: transformers 5.23 would go on at 3, within the clip.
    assert positions(13, placed(1, 10, 2, 4)) == [*line(0, 0), *grid, *line(6, 7)]


def test_a_picture_after_such_a_clip_begins_after_it_as_well() -> None:
    clip = [[1 + step, 1, 1] for step in range(4)]
    image = [[7, 7 + row, 7 + column] for row in range(2) for column in range(2)]
    items = placed(1, 8, 2, 2), placed(7, 1, 4, 4)
    assert positions(13, *items) == [*line(0, 0), *clip, *line(5, 6), *image, *line(9, 10)]


def test_a_merge_window_of_another_size() -> None:
    media = Media(kind="image", patches=torch.empty(0, 588), grid=(1, 3, 6), num_tokens=2, digest=b"")
    found = rotary_positions(4, [PlacedMedia(first=1, media=media)], merge_size=3)
    assert found.tolist() == [[0] * 3, [1, 1, 1], [1, 1, 2], [3] * 3]
