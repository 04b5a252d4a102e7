"""Clips against what transformers' video processor does.

Its module cannot be imported without torchvision. What it does before resizing is a few lines of Pillow and torch, so
its rules are written out here, and its image processor, which needs no torchvision, cuts the frames.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from ernie45.types.limits import MediaLimits
from ernie45.vision.clips import sample_frames
from ernie45.vision.settings import VisionSettings
from ernie45.vision.timestamps import time_text
from ernie45.vision.video import prepare_video

SETTINGS = VisionSettings()


def transformers_indices(num_frames: int, fps: float) -> list[int]:
    """`sample_frames(metadata, fps=2)`: the first frame of equal parts whose number need not be whole."""
    wanted = min(max(num_frames / fps * 2, 16), 180, num_frames)
    indices: list[int] = torch.arange(0, num_frames, num_frames / wanted).int().tolist()
    return indices


def transformers_text(seconds: float) -> str:
    """`_convert_timestamp`."""
    hours, rest = seconds // 3600, seconds % 3600
    return f"time: {int(hours):02d}:{int(rest // 60):02d}:{rest % 60:05.02f}"


@pytest.mark.parametrize("fps", [10, 20, 24, 30, 60])
@pytest.mark.parametrize("seconds", [8, 9, 15, 30, 89, 90])
def test_the_same_frames_at_even_rates(fps: int, seconds: int) -> None:
    # At odd rates FastDeploy, which we follow, goes to the nearest frame, and transformers to the one before.
    assert sample_frames(fps * seconds, seconds, SETTINGS) == transformers_indices(fps * seconds, fps)


def test_the_same_text() -> None:
    for seconds in np.random.default_rng(1).uniform(0, 10_000, 1000):
        assert time_text(seconds) == transformers_text(seconds)
    for frame in range(5000):
        assert time_text(frame / 30) == transformers_text(frame / 30)


@pytest.mark.parametrize("size", [(64, 48), (333, 250), (640, 360)])
def test_the_same_patches(size: tuple[int, int]) -> None:
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    generator = np.random.default_rng(7)
    frames = [Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(4)]
    processor = Ernie4_5_VLMoeImageProcessorPil(
        size={"shortest_edge": SETTINGS.min_frame_pixels, "longest_edge": SETTINGS.max_frame_pixels},
        do_rescale=False,
        do_normalize=False,
    )
    timed = []
    for number, frame in enumerate(frames):
        font_size = int(min(size) * 0.1)
        drawn = frame.copy()
        ImageDraw.Draw(drawn).text(
            (0, 0),
            transformers_text(number / 2),
            font=ImageFont.load_default(font_size),
            fill=(0, 0, 0),
            stroke_width=int(font_size * 0.1),
            stroke_fill=(255, 255, 255),
        )
        timed.append(drawn)
    expected = processor(images=timed, return_tensors="pt")
    media = prepare_video(frames, SETTINGS, limits=MediaLimits(), fps=2)
    assert [list(media.grid[1:])] * 4 == expected["image_grid_thw"][:, 1:].tolist()
    difference = media.patches.float() - expected["pixel_values"].float()
    assert difference.abs().max() <= 1
