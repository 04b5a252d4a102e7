from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ernie45.errors import InvalidRequestError
from ernie45.vision.patches import prepare_frames, prepare_image
from ernie45.vision.settings import VisionSettings

SETTINGS = VisionSettings()


def coloured(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("patch", "merge"), [(14, 2), (4, 3), (1, 1)])
def test_every_pixel_is_where_the_order_says(patch: int, merge: int) -> None:
    factor = patch * merge
    width, height = 4 * factor, 3 * factor
    settings = VisionSettings(patch_size=patch, merge_size=merge, min_pixels=1)
    image = coloured(width, height)
    media = prepare_image(image, settings)
    assert media.grid == (1, height // patch, width // patch)
    assert media.num_tokens == 12
    pixels, expected = np.asarray(image), []
    for window_row in range(3):
        for window_column in range(4):
            for row in range(merge):
                for column in range(merge):
                    top, left = window_row * factor + row * patch, window_column * factor + column * patch
                    for channel in range(3):
                        expected.append(pixels[top : top + patch, left : left + patch, channel].reshape(-1))
    assert torch.equal(media.patches, torch.from_numpy(np.concatenate(expected)).view(-1, 3 * patch * patch))


def test_frames_follow_each_other_and_an_odd_last_one_is_repeated() -> None:
    settings = VisionSettings(min_frame_pixels=784)
    frames = [coloured(56, 84, seed) for seed in range(3)]
    media = prepare_frames(frames, settings)
    assert (media.kind, media.grid, media.num_tokens) == ("video", (4, 6, 4), 12)
    for index, frame in enumerate([*frames, frames[-1]]):
        one = prepare_image(frame, settings)
        assert torch.equal(media.patches[24 * index : 24 * index + 24], one.patches)


def test_equal_pictures_have_equal_digests_and_others_do_not() -> None:
    image = coloured(56, 56)
    digest = prepare_image(image, SETTINGS).digest
    changed = image.copy()
    changed.putpixel((55, 55), (1, 2, 3))
    settings = VisionSettings(min_frame_pixels=784)
    assert prepare_image(image.copy(), SETTINGS).digest == digest
    others = [
        prepare_image(changed, SETTINGS),
        prepare_frames([image], settings),
        prepare_frames([image] * 4, settings),
        prepare_image(Image.new("RGB", (56, 112)), SETTINGS),
        prepare_image(Image.new("RGB", (112, 56)), SETTINGS),
    ]
    assert len({digest, *(media.digest for media in others)}) == 6


def test_the_picture_given_is_not_changed() -> None:
    image = coloured(56, 56)
    before = image.tobytes()
    prepare_image(image, SETTINGS).patches.zero_()
    assert image.tobytes() == before


def test_max_pixels_lowers_and_raises_the_limit() -> None:
    image = coloured(280, 280)
    assert prepare_image(image, SETTINGS, max_pixels=100 * 784).num_tokens == 100
    assert prepare_image(image, SETTINGS, max_pixels=25 * 784).num_tokens == 25
    assert prepare_image(image, SETTINGS, max_pixels=784).num_tokens == 1  # below the least, nothing is enlarged
    assert prepare_frames([image], SETTINGS, max_pixels=25 * 784).num_tokens == 25
    narrow = VisionSettings(max_pixels=25 * 784)
    assert prepare_image(image, narrow, max_pixels=100 * 784).num_tokens == 100


@pytest.mark.parametrize("value", [0, -1, 783, 1e6, True, "4000"])
def test_a_max_pixels_below_a_window_is_refused(value: int) -> None:
    with pytest.raises(InvalidRequestError, match="max_pixels is"):
        prepare_image(coloured(56, 56), SETTINGS, max_pixels=value)
