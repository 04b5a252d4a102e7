"""Clips of every source, from sampling to patches."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.types.media import Media
from ernie45.vision.patches import prepare_frames
from ernie45.vision.settings import VisionSettings
from ernie45.vision.timestamps import draw_time
from ernie45.vision.video import open_clip, prepare_video, probe_video

LIMITS = MediaLimits()
SETTINGS = VisionSettings(min_frame_pixels=56 * 56, max_frame_pixels=112 * 112)


def noisy_frames(num_frames: int, size: tuple[int, int] = (90, 70)) -> list[Image.Image]:
    generator = np.random.default_rng(num_frames)
    shape = (num_frames, size[1], size[0], 3)
    return [Image.fromarray(pixels) for pixels in generator.integers(0, 256, shape, dtype=np.uint8)]


def expected_media(frames: Sequence[Image.Image], times: Sequence[float], settings: VisionSettings = SETTINGS) -> Media:
    return prepare_frames([draw_time(frame, at, None) for frame, at in zip(frames, times, strict=True)], settings)


def same(media: Media, expected: Media) -> bool:
    return media.digest == expected.digest and torch.equal(media.patches, expected.patches)


def test_sampled_then_timed_then_resized() -> None:
    frames = noisy_frames(30)
    media = prepare_video(frames, SETTINGS, limits=LIMITS, fps=2)
    assert media.kind == "video"
    assert media.grid == (30, 4, 6)  # 90 x 70 becomes 84 x 56
    assert media.num_tokens == 15 * 6
    assert same(media, expected_media(frames, [number / 2 for number in range(30)]))


def test_an_odd_last_frame_is_shown_twice() -> None:
    frames = noisy_frames(5)
    media = prepare_video(frames, SETTINGS, limits=LIMITS, fps=1)
    assert media.grid[0] == 6
    per_frame = len(media.patches) // 6
    assert torch.equal(media.patches[-per_frame:], media.patches[-2 * per_frame : -per_frame])
    assert same(media, expected_media(frames, range(5)))


def test_frames_without_a_rate_are_taken_as_24_a_second() -> None:
    frames = noisy_frames(34)
    numbers = [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31]  # 16 parts of 2.125 frames
    expected = expected_media([frames[number] for number in numbers], [number / 24 for number in numbers])
    assert same(prepare_video(frames, SETTINGS, limits=LIMITS), expected)


def test_the_rate_changes_which_frames_and_which_times() -> None:
    frames = noisy_frames(34)
    numbers = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32]
    expected = expected_media([frames[number] for number in numbers], [number / 4 for number in numbers])
    assert same(prepare_video(frames, SETTINGS, limits=LIMITS, fps=4), expected)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_arrays_and_tensors(channels_last: bool, as_tensor: bool) -> None:
    frames = noisy_frames(10)
    array = np.stack([np.asarray(frame) for frame in frames])
    if not channels_last:
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    source: Any = torch.from_numpy(array) if as_tensor else array
    assert same(
        prepare_video(source, SETTINGS, limits=LIMITS, fps=5), prepare_video(frames, SETTINGS, limits=LIMITS, fps=5)
    )


def test_frames_of_mixed_kinds(tmp_path: Path) -> None:
    frames = noisy_frames(4)
    frames[0].save(tmp_path / "0.png")
    file = io.BytesIO()
    frames[1].save(file, "PNG")
    mixed: list[Any] = [str(tmp_path / "0.png"), file.getvalue(), np.asarray(frames[2]), frames[3]]
    assert same(prepare_video(mixed, SETTINGS, limits=LIMITS), prepare_video(frames, SETTINGS, limits=LIMITS))


def test_a_frame_of_another_size_is_named() -> None:
    frames = noisy_frames(3)
    with pytest.raises(MediaError, match="frame 3 of the clip is 70 x 90, and its first 90 x 70"):
        prepare_video([*frames, frames[0].rotate(90, expand=True)], SETTINGS, limits=LIMITS)


def test_a_frame_that_cannot_be_opened() -> None:
    with pytest.raises(MediaError):
        prepare_video([*noisy_frames(2), b"no picture"], SETTINGS, limits=LIMITS)


@pytest.mark.parametrize("source", [[], (), np.zeros((0, 4, 4, 3), np.uint8), torch.zeros(0, 3, 4, 4)])
def test_no_frames(source: Any) -> None:
    with pytest.raises(MediaError, match="no frames"):
        prepare_video(source, SETTINGS, limits=LIMITS)


@pytest.mark.parametrize("source", [3, None, {"video": 1}, object()])
def test_what_is_no_clip(source: Any) -> None:
    with pytest.raises(MediaError, match="is no clip"):
        prepare_video(source, SETTINGS, limits=LIMITS)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (1, 2, 4, 4, 3), (2, 5, 6, 7)])
def test_an_array_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError):
        prepare_video(np.zeros(shape, np.uint8), SETTINGS, limits=LIMITS)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), True, "8"])
def test_an_impossible_rate(fps: Any) -> None:
    with pytest.raises(MediaError, match="fps is"):
        prepare_video(noisy_frames(2), SETTINGS, limits=LIMITS, fps=fps)


def test_a_rate_that_makes_the_clip_last_for_years() -> None:
    with pytest.raises(MediaError, match="lasts"):
        prepare_video(noisy_frames(2), SETTINGS, limits=LIMITS, fps=1e-9)


def gif(num_frames: int) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (90, 70), (number * 9, 0, 0)) for number in range(num_frames)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250)
    return file.getvalue()


def test_a_gif_from_everywhere(tmp_path: Path) -> None:
    content = gif(20)
    frames = [Image.new("RGB", (90, 70), (number * 9, 0, 0)) for number in range(20)]
    # 5 seconds: 16 parts of 1.25 frames
    numbers = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    expected = expected_media([frames[number] for number in numbers], [number / 4 for number in numbers])
    (tmp_path / "clip.gif").write_bytes(content)
    encoded = base64.b64encode(content).decode()
    with Image.open(io.BytesIO(content)) as picture:
        sources: list[Any] = [
            content,
            tmp_path / "clip.gif",
            str(tmp_path / "clip.gif"),
            f"data:image/gif;base64,{encoded}",
            picture,
        ]
        for source in sources:
            assert same(prepare_video(source, SETTINGS, limits=LIMITS), expected), source


def test_a_rate_for_a_clip_with_its_own_times() -> None:
    with pytest.raises(MediaError, match="fps=8"):
        prepare_video(gif(3), SETTINGS, limits=LIMITS, fps=8)


def test_probing_agrees_with_preparing() -> None:
    for source, fps in (
        (noisy_frames(5), 1.0),
        (noisy_frames(40), 2.0),
        (noisy_frames(7, (33, 200)), None),
        (gif(4), None),
    ):
        num_frames, width, height = probe_video(source, SETTINGS, limits=LIMITS, fps=fps)
        assert prepare_video(source, SETTINGS, limits=LIMITS, fps=fps).grid[0] == num_frames
        assert (width, height) == open_clip(source, limits=LIMITS, fps=fps).size
    assert probe_video(noisy_frames(5), SETTINGS, limits=LIMITS) == (6, 90, 70)


def test_max_pixels_of_a_call() -> None:
    frames = noisy_frames(2, (280, 280))
    assert prepare_video(frames, SETTINGS, limits=LIMITS).size == (112, 112)
    assert prepare_video(frames, SETTINGS, limits=LIMITS, max_pixels=200 * 200).size == (196, 196)
    assert prepare_video(frames, SETTINGS, limits=LIMITS, max_pixels=60 * 60).size == (56, 56)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (4000, 10), (1920, 1080), (613, 427)])
def test_frames_are_resized_once(size: tuple[int, int]) -> None:
    frames = noisy_frames(2, size)
    expected = expected_media(frames, [0, 1 / 24], VisionSettings())
    assert same(prepare_video(frames, VisionSettings(), limits=LIMITS), expected)


def test_a_video_file(tmp_path: Path) -> None:
    from tests import clip_files  # skips without PyAV, and says so

    content = clip_files.clip_file(250, fps=25)
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    numbers = [0, 12, 25, 38, 50, 62, 75, 88, 100, 112, 125, 138, 150, 162, 175, 188, 200, 212, 225, 238]
    frames = list(open_clip(path, limits=LIMITS).read(numbers))
    assert [clip_files.frame_number(frame) for frame in frames] == numbers
    expected = expected_media(frames, [number / 25 for number in numbers])
    encoded = base64.b64encode(content).decode()
    for source in (path, str(path), content, f"data:video/mp4;base64,{encoded}"):
        assert same(prepare_video(source, SETTINGS, limits=LIMITS), expected)
    assert probe_video(path, SETTINGS, limits=LIMITS) == (20, 64, 48)


def test_limits_apply_to_files_and_frames(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="max_pixels=99"):
        prepare_video(noisy_frames(2), SETTINGS, limits=MediaLimits(max_pixels=99))
    with pytest.raises(MediaError, match="max_bytes=99"):
        prepare_video(gif(2), SETTINGS, limits=MediaLimits(max_bytes=99))
    with pytest.raises(MediaError, match="no such file"):
        prepare_video(tmp_path / "gone.mp4", SETTINGS, limits=LIMITS)
