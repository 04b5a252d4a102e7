"""Pixels to patches: resized, cut and put in the order of the vision tower."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ernie45.errors import InvalidRequestError
from ernie45.types.media import Media, MediaKind
from ernie45.vision.resize import smart_resize
from ernie45.vision.settings import VisionSettings

TEMPORAL_MERGE = 2


def prepare_image(image: Image.Image, settings: VisionSettings, *, max_pixels: int | None = None) -> Media:
    """Resize an RGB picture by the settings and cut it into patches.

    `max_pixels` lowers or raises their limit; where it is below their least, small pictures are not enlarged.
    Raises InvalidRequestError for a `max_pixels` below one merge window.
    """
    return _media("image", [image], image_size(image.size, settings, max_pixels=max_pixels), settings)


def prepare_frames(frames: Sequence[Image.Image], settings: VisionSettings, *, max_pixels: int | None = None) -> Media:
    """Resize the RGB frames of a clip, all of one size, and cut them into patches; an odd last one is shown twice.

    `max_pixels` is of each frame, and as in `prepare_image`.
    """
    size = frame_size(frames[0].size, settings, max_pixels=max_pixels)
    padded = [*frames, *frames[-1:]] if len(frames) % TEMPORAL_MERGE else frames
    return _media("video", padded, size, settings)


def image_size(size: tuple[int, int], settings: VisionSettings, *, max_pixels: int | None) -> tuple[int, int]:
    """Width and height that a picture of `size` is resized to. `max_pixels` as in `prepare_image`."""
    least, most = _limits(max_pixels, settings.min_pixels, settings.max_pixels, settings)
    return smart_resize(*size, factor=settings.factor, min_pixels=least, max_pixels=most)


def frame_size(size: tuple[int, int], settings: VisionSettings, *, max_pixels: int | None) -> tuple[int, int]:
    """Width and height that frames of `size` are resized to. `max_pixels` as in `prepare_frames`."""
    least, most = _limits(max_pixels, settings.min_frame_pixels, settings.max_frame_pixels, settings)
    return smart_resize(*size, factor=settings.factor, min_pixels=least, max_pixels=most)


def _limits(asked: int | None, least: int, most: int, settings: VisionSettings) -> tuple[int, int]:
    if asked is None:
        return least, most
    window = settings.factor**2
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < window:
        raise InvalidRequestError(f"max_pixels is {asked!r:.100}", hint=f"give a whole number from {window}")
    return (least if asked >= least else window), asked


def _media(kind: MediaKind, images: Sequence[Image.Image], size: tuple[int, int], settings: VisionSettings) -> Media:
    rows, columns = size[1] // settings.patch_size, size[0] // settings.patch_size
    patches = torch.empty(len(images), rows * columns, 3 * settings.patch_size**2, dtype=torch.uint8)
    for image, cut in zip(images, patches.numpy(), strict=True):
        _cut(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC), settings, cut)
    patches = patches.view(-1, patches.shape[-1])
    num_tokens = len(patches) // settings.merge_size**2 // (TEMPORAL_MERGE if kind == "video" else 1)
    grid = (len(images), rows, columns)
    digest = hashlib.sha256(f"{kind} {grid}".encode())  # the quickest where processors have instructions for it
    digest.update(patches.numpy().data)
    return Media(kind=kind, patches=patches, grid=grid, num_tokens=num_tokens, digest=digest.digest()[:16])


def _cut(image: Image.Image, settings: VisionSettings, out: np.ndarray[Any, Any]) -> None:
    """Into uint8 [P, C · patch · patch]: by merge window, within it row by row, within a patch channel by channel."""
    patch, merge, factor = settings.patch_size, settings.merge_size, settings.factor
    down, across = image.height // factor, image.width // factor
    # "RGB;L" is a row of red, one of green, one of blue: a patch's row then lies in one piece, and is copied as one.
    piece = np.dtype((np.void, patch))
    pixels = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=piece)
    windows = pixels.reshape(down, merge, patch, 3, across, merge).transpose(0, 4, 1, 5, 3, 2)
    out.reshape(-1).view(piece).reshape(windows.shape)[...] = windows
