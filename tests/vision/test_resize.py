from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.vision.resize import smart_resize

MIN_PIXELS, MAX_PIXELS = 56 * 56, 6177 * 28 * 28


def resized(width: int, height: int) -> tuple[int, int]:
    return smart_resize(width, height, factor=28, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((56, 56), (56, 56)),
        ((1920, 1080), (1932, 1092)),  # 68.57 and 38.57 windows
        ((70, 98), (56, 112)),  # 2.5 and 3.5 windows: halves go to the even number
        ((10, 10), (56, 56)),
        ((1, 1), (56, 56)),
        ((13, 2000), (28, 700)),  # 0 windows wide; times sqrt(3136 / 26000) = 0.3473: 4.51 and 694.6
        ((4000, 3000), (2520, 1904)),  # divided by sqrt(12000000 / 4842768) = 1.57414: 2541.1 and 1905.8
        ((20, 4000), (28, 4004)),  # just 200 to 1; 0.71 and 142.86 windows
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized(*size) == expected
    assert resized(*size[::-1]) == expected[::-1]


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_sides_are_multiples_and_the_area_within_the_limits(width: int, height: int) -> None:
    new_width, new_height = resized(width, height)
    assert new_width % 28 == new_height % 28 == 0
    assert MIN_PIXELS <= new_width * new_height <= MAX_PIXELS


@given(st.integers(1, 300), st.integers(1, 1000))
def test_what_is_longer_than_200_to_1_becomes_as_long_as_200_to_1(short: int, more: int) -> None:
    rounded = max(28, round(short / 28) * 28)
    assert resized(short, short * 200 + more) == resized(rounded, rounded * 200)
