"""Patches equal those of transformers' Pillow processor; where ours differs on purpose, values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ernie45.types.limits import MediaLimits
from ernie45.vision.image import open_image
from ernie45.vision.patches import prepare_image
from ernie45.vision.settings import IMAGE_MEAN, IMAGE_STD, VisionSettings

MODES = ("L", "RGB", "P", "RGBA", "CMYK", "1", "LA", "YCbCr", "HSV", "RGBX")
SETTINGS = VisionSettings()


@pytest.fixture(scope="module")
def processor():  # type: ignore[no-untyped-def]
    from transformers.models.ernie4_5_vl_moe import image_processing_pil_ernie4_5_vl_moe as reference

    return reference.Ernie4_5_VLMoeImageProcessorPil()


@pytest.mark.parametrize("seed", range(200))
def test_patches_equal_those_of_transformers(processor, seed: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    image = _picture(rng, MODES[seed % len(MODES)])
    most = 40_000 if seed % 4 == 0 else SETTINGS.max_pixels
    size = {"shortest_edge": SETTINGS.min_pixels, "longest_edge": most}
    theirs = processor(images=image, size=size, return_tensors="pt")
    ours = prepare_image(open_image(image, limits=MediaLimits()), SETTINGS, max_pixels=most)
    assert [list(ours.grid)] == theirs["image_grid_thw"].tolist()
    assert ours.num_tokens == len(theirs["pixel_values"]) // 4
    mean, std = (torch.tensor(numbers).repeat_interleave(14 * 14) for numbers in (IMAGE_MEAN, IMAGE_STD))
    difference = (ours.patches / 255 - mean) / std - theirs["pixel_values"]
    assert bool((difference.abs() <= 1.001 / 255 / std).all())


def _picture(rng: np.random.Generator, mode: str) -> Image.Image:
    """Colour gradients, stripes and some noise, of any shape up to 1:200."""
    short = int(np.exp(rng.uniform(np.log(1), np.log(200))))
    long = min(int(short * np.exp(rng.uniform(0, np.log(200)))), 900)
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    y, x = np.mgrid[0:height, 0:width]
    bands = [(x * rng.integers(1, 5) + y * rng.integers(1, 5)) % 256 for _ in range(4)]
    pixels = (np.stack(bands, -1) + rng.integers(0, 30, (height, width, 4))).clip(0, 255).astype(np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), pixels.tobytes())
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])).convert(mode)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.array([0, 128, 129, 257, 32768, 65535], dtype=np.uint16)
    image = Image.fromarray(np.repeat(np.repeat(levels[:, None], 56, 0), 56, 1))
    # 128 / 257 is below a half and 129 / 257 above; 32768 / 257 is 127.5
    media = prepare_image(open_image(image, limits=MediaLimits()), SETTINGS)
    assert media.grid == (1, 24, 4)
    seen = media.patches.view(12, 2, 2, 2, 3, 14, 14)[:, 0, 0, 0, 0, 7, 7]
    assert seen.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 128, 128, 255, 255]


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [
        (20, 4400, 2, 400),  # 20 -> 28, and 200 times that is 5600 = 400 patches
        (10, 100_000, 2, 400),
        (4100, 20, 400, 2),
        (14, 2801, 2, 400),  # 14 / 28 is a half: rounded to 0, and one window is the least
        (100, 20_100, 8, 1600),  # 100 -> 112, 22400: 2.5 million pixels, within the limit
        (
            200,
            50_000,
            10,
            2222,
        ),  # 200 -> 196, 39200; by sqrt(7683200 / 4842768) = 1.25957: 155.6, 31121.7, 1111 windows
        (1, 201, 2, 400),
    ],
)
def test_what_is_longer_than_200_to_1_becomes_200_to_1(width: int, height: int, columns: int, rows: int) -> None:
    media = prepare_image(Image.new("RGB", (width, height), (1, 2, 3)), SETTINGS)
    assert media.grid == (1, rows, columns)
    assert media.num_tokens == rows * columns // 4
    assert media.patches.view(-1, 3, 196).float().mean((0, 2)).tolist() == [1, 2, 3]
