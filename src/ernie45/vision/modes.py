"""Pillow's picture modes and arrays of pixels, as plain RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms

from ernie45.errors import MediaError

_CHANNELS = (1, 3, 4)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A loaded picture of any mode as RGB; itself when it is opaque RGB already.

    What is transparent shows white. 16-bit grey is scaled to 8 bits; F holds 0 to 255, or 0 to 1 if nothing is above 1.
    Colour profiles are not applied, as with Baidu's and transformers' processors.
    Raises MediaError for grey values out of range; `name` is what it calls the picture.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _deep_grey(image, name)
    if image.mode == "F":
        pixels = np.asarray(image)
        _check_range(pixels, 0, 255, name)
        return Image.fromarray(np.rint(pixels * (255 if pixels.max() <= 1 else 1)).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
        assert converted is not None  # None is for transforms in place only
        return converted
    if image.has_transparency_data:
        plain = image.convert("LA") if image.mode == "La" else image  # premultiplied grey converts to nothing else
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, plain.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image, name: str) -> Image.Image:
    # Pillow's own conversion cuts everything above 255 off.
    pixels = np.asarray(image)
    _check_range(pixels, 0, 65535, name)
    grey = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def array_size(array: np.ndarray[Any, Any] | torch.Tensor, name: str) -> tuple[int, int]:
    """Width and height of an array of pixels; MediaError when its shape is no picture's."""
    return _layout(tuple(array.shape), name, channels_first=isinstance(array, torch.Tensor))[:2]


def from_array(array: np.ndarray[Any, Any] | torch.Tensor, name: str) -> Image.Image:
    """An array [H, W], [H, W, C] or [C, H, W] of 1, 3 or 4 channels as a picture, L, RGB or RGBA.

    Where both layouts are possible, numpy's is [H, W, C] and torch's [C, H, W]. Values: bool, uint8, uint16 (scaled to
    8 bits) or floating from 0 to 1. Raises MediaError for another shape, type or range.
    """
    *_, first = _layout(tuple(array.shape), name, channels_first=isinstance(array, torch.Tensor))
    if isinstance(array, torch.Tensor):
        host = array.detach().cpu()
        pixels: np.ndarray[Any, Any] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    else:
        pixels = array
    bytes_ = _eight_bits(np.moveaxis(pixels, 0, -1) if first else pixels, name)
    return Image.fromarray(
        np.ascontiguousarray(bytes_[:, :, 0] if bytes_.ndim == 3 and bytes_.shape[2] == 1 else bytes_)
    )


def _layout(shape: tuple[int, ...], name: str, *, channels_first: bool) -> tuple[int, int, bool]:
    """Width, height, and whether the channels come first."""
    if len(shape) == 2:
        return shape[1], shape[0], False
    fits_first, fits_last = len(shape) == 3 and shape[0] in _CHANNELS, len(shape) == 3 and shape[2] in _CHANNELS
    if not (fits_first or fits_last):
        raise MediaError(
            f"{name}: its shape {list(shape)} is not a picture's",
            hint="give one picture: [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels",
        )
    if fits_first and (channels_first or not fits_last):
        return shape[2], shape[1], True
    return shape[1], shape[0], False


def _eight_bits(pixels: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind == "b":
        return np.asarray(pixels.astype(np.uint8) * np.uint8(255), dtype=np.uint8)
    if kind == "u" and pixels.dtype.itemsize == 2:
        return np.asarray((pixels.astype(np.uint32) + 128) // 257, dtype=np.uint8)
    if kind == "f":
        _check_range(pixels, 0, 1, name)
        return np.asarray(np.rint(pixels.astype(np.float32) * 255), dtype=np.uint8)
    raise MediaError(
        f"{name}: its values are {pixels.dtype}",
        hint="give bool, uint8, uint16 or floating values from 0 to 1; whole numbers up to 255 as uint8",
    )


def _check_range(pixels: np.ndarray[Any, Any], least: int, most: int, name: str) -> None:
    low, high = pixels.min(), pixels.max()
    if not (low >= least and high <= most):  # false for NaN too
        raise MediaError(
            f"{name}: its values go from {low:g} to {high:g}, and {least} to {most} is wanted",
            hint="scale them, or give 8-bit values",
        )
