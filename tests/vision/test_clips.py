"""Which frames are shown; expected numbers worked out by hand from FastDeploy's rule."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence

import pytest
from PIL import Image

from ernie45.errors import MediaError
from ernie45.vision import clips
from ernie45.vision.clips import Clip, sample_frames
from ernie45.vision.settings import VisionSettings

SETTINGS = VisionSettings()


@pytest.mark.parametrize("num_frames", [1, 2, 15, 16])
@pytest.mark.parametrize("seconds", [0.1, 7.0, 8.0, 500.0])
def test_a_clip_of_sixteen_frames_or_fewer_is_shown_whole(num_frames: int, seconds: float) -> None:
    assert sample_frames(num_frames, seconds, SETTINGS) == list(range(num_frames))


def test_a_short_clip_gives_the_first_frame_of_sixteen_equal_parts() -> None:
    # 2 seconds would give 4 frames. Parts of 50 / 16 = 3.125 frames begin at 0, 3.125, 6.25, ... 46.875.
    expected = [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 46]
    assert sample_frames(50, 2.0, SETTINGS) == expected
    assert sample_frames(17, 1.0, SETTINGS) == list(range(16))  # parts of 1.0625 frames


def test_the_least_number_is_of_whole_half_seconds() -> None:
    # 7.96 seconds hold 15 whole half seconds: 16 parts of 199 / 16 = 12.4375 frames. 8 seconds hold 16.
    expected = [0, 12, 24, 37, 49, 62, 74, 87, 99, 111, 124, 136, 149, 161, 174, 186]
    assert sample_frames(199, 7.96, SETTINGS) == expected
    # At 25 frames a second every 12.5th, a tie to the even one: 12, 25, 38 (37.5), 50, 62 (62.5), ...
    expected = [0, 12, 25, 38, 50, 62, 75, 88, 100, 112, 125, 138, 150, 162, 175, 188]
    assert sample_frames(200, 8.0, SETTINGS) == expected


def test_two_frames_a_second_at_thirty_frames_a_second() -> None:
    assert sample_frames(300, 10.0, SETTINGS) == list(range(0, 300, 15))
    # A last half second that has begun counts: 10.3 seconds give 21 frames.
    assert sample_frames(309, 10.3, SETTINGS) == list(range(0, 301, 15))


def test_two_frames_a_second_at_a_broadcast_rate() -> None:
    # 30000 / 1001 = 29.97 frames a second: i · 14.985, rounded.
    numbers = sample_frames(300, 300 * 1001 / 30000, SETTINGS)
    assert numbers == list(range(0, 300, 15))  # the last is 284.7; 299.7 would be past the end
    later = sample_frames(3000, 3000 * 1001 / 30000, VisionSettings(max_frames=500))
    assert [later[part] for part in (33, 34, 40, 100)] == [
        495,
        509,
        599,
        1499,
    ]  # 494.5, 509.5, 599.4, 1498.5, all above


def test_a_long_clip_gives_the_first_frame_of_180_equal_parts() -> None:
    # 100 seconds at 30 a second: parts of 3000 / 180 = 16.67 frames.
    numbers = sample_frames(3000, 100.0, SETTINGS)
    assert len(numbers) == 180
    assert numbers[:7] == [0, 16, 33, 50, 66, 83, 100]
    assert numbers[-1] == 2983


@pytest.mark.parametrize("hundredths", range(8900, 9200, 7))
def test_never_more_than_the_most_allowed(hundredths: int) -> None:
    numbers = sample_frames(hundredths * 30 // 100, hundredths / 100, SETTINGS)
    assert len(numbers) == min(180, -(-hundredths * 2 // 100))


def test_a_slow_clip_is_shown_whole_and_no_frame_twice() -> None:
    assert sample_frames(20, 20.0, SETTINGS) == list(range(20))  # one frame a second
    assert sample_frames(40, 20.0, SETTINGS) == list(range(40))  # just two
    assert sample_frames(100, 3600.0, SETTINGS) == list(range(100))
    assert len(sample_frames(3600, 36000.0, SETTINGS)) == 180


@pytest.mark.parametrize("num_frames", [1, 7, 16, 17, 33, 100, 181, 1000])
@pytest.mark.parametrize("fps", [0.1, 1.9, 2.0, 2.1, 3.0, 7.5, 23.976, 60.0])
def test_numbers_rise_from_the_first_frame_and_stay_within_the_clip(num_frames: int, fps: float) -> None:
    numbers = sample_frames(num_frames, num_frames / fps, SETTINGS)
    assert numbers[0] == 0
    assert all(before < after for before, after in itertools.pairwise(numbers))
    assert numbers[-1] < num_frames
    assert min(16, num_frames) <= len(numbers) <= 180


def test_the_settings_decide() -> None:
    settings = VisionSettings(frames_per_second=1.0, min_frames=2, max_frames=4)
    assert sample_frames(30, 3.0, settings) == [0, 10, 20]
    assert sample_frames(30, 1.0, settings) == [0, 15]
    assert sample_frames(100, 10.0, settings) == [0, 25, 50, 75]


def _read(numbers: Sequence[int]) -> Iterator[Image.Image]:
    return iter(())


def test_a_clip_refuses_impossible_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MediaError, match="no frames"):
        Clip(times=array("d"), seconds=0.0, size=(4, 4), read=_read)
    for seconds in (0.0, -1.0, float("nan"), float("inf"), 86401.0):
        with pytest.raises(MediaError, match=r"lasts .* 86400"):
            Clip(times=[0.0], seconds=seconds, size=(4, 4), read=_read)
    monkeypatch.setattr(clips, "MAX_FRAMES", 3)
    with pytest.raises(MediaError, match="more than 3 frames"):
        Clip(times=[0.0] * 4, seconds=1.0, size=(4, 4), read=_read)
