from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision.image import FORMATS, ImageSource, open_image

LIMITS = MediaLimits()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(width: int = 40, height: int = 24) -> Image.Image:
    """Red at the top left, green at the top right, blue at the bottom left, white at the bottom right."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def stored(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def opened(source: ImageSource, limits: MediaLimits = LIMITS) -> Image.Image:
    image = open_image(source, limits=limits)
    assert image.mode == "RGB"
    return image


def seen(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours of the four corners: top left, top right, bottom left, bottom right."""
    width, height = image.size
    pixels = np.asarray(image)
    places = [(2, 2), (2, width - 3), (height - 3, 2), (height - 3, width - 3)]
    return [tuple(map(int, pixels[row, column])) for row, column in places]


CORNERS = [RED, GREEN, BLUE, WHITE]

# Where it comes from


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    content = stored(corners())
    path = tmp_path / "corners.png"
    path.write_bytes(content)
    pixels = np.asarray(corners())
    sources: list[ImageSource] = [path, str(path), content, bytearray(content), memoryview(content), corners()]
    sources += ["data:image/png;base64," + base64.b64encode(content).decode()]
    sources += [
        pixels,
        pixels.transpose(2, 0, 1),
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels[:, ::-1][:, ::-1],
    ]
    sources += [pixels.astype(np.uint16) * 257, pixels == 255, torch.from_numpy(pixels.copy())]
    sources += [torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(pixels / 255).bfloat16()]
    sources += [torch.from_numpy(pixels / 255).requires_grad_(), Image.open(path)]
    for source in sources:
        assert opened(source).tobytes() == corners().tobytes(), type(source)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_is_read(file_format: str) -> None:
    Image.init()
    if file_format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {file_format}")
    options: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100},
    }
    image = opened(stored(corners(), file_format, **options.get(file_format, {})))
    assert image.size == (40, 24)
    assert np.abs(np.array(seen(image)) - np.array(CORNERS)).max() <= 8


def test_a_tensor_that_could_be_either_has_its_channels_first_and_an_array_last() -> None:
    ambiguous = np.zeros((3, 5, 4), dtype=np.uint8)
    assert opened(ambiguous).size == (5, 3)
    assert opened(torch.from_numpy(ambiguous)).size == (4, 5)


def test_files_are_closed_and_sources_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "corners.tiff"
    path.write_bytes(stored(corners(), "TIFF"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        opened(path)
    given = corners().convert("RGBA")
    before = given.tobytes()
    opened(given)
    array = np.asarray(corners())
    opened(array)
    assert given.tobytes() == before
    assert given.mode == "RGBA"
    assert array.tobytes() == corners().tobytes()


# How it is turned


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (9, [RED, GREEN, BLUE, WHITE]),
    ],
)
def test_exif_orientation_is_applied(file_format: str, orientation: int, shown: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(corners(), file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    for source in (content, Image.open(io.BytesIO(content))):
        image = opened(source)
        assert image.size == ((24, 40) if orientation in (5, 6, 7, 8) else (40, 24))
        assert np.abs(np.array(seen(image)) - np.array(shown)).max() <= 60


def test_a_picture_with_a_damaged_exif_block_is_shown_as_stored() -> None:
    content = stored(corners(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert opened(content).size == (40, 24)


# What is transparent


def half_clear() -> Image.Image:
    """Blue, opaque on the left, half there in the middle, and transparent (but black) on the right."""
    image = Image.new("RGBA", (30, 10), (0, 0, 255, 255))
    image.paste((0, 0, 255, 128), (10, 0, 20, 10))
    image.paste((0, 0, 0, 0), (20, 0, 30, 10))
    return image


def test_transparency_is_put_on_white() -> None:
    for source in (half_clear(), stored(half_clear()), half_clear().convert("RGBa"), np.asarray(half_clear())):
        image = np.asarray(opened(source))
        assert image[5, 5].tolist() == [0, 0, 255]
        assert np.abs(image[5, 15].astype(int) - [127, 127, 255]).max() <= 1
        assert image[5, 25].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["LA", "La", "PA"])
def test_grey_and_palettes_with_alpha_are_put_on_white(mode: str) -> None:
    image = Image.new("LA", (4, 4), (0, 0))
    image.paste((100, 255), (0, 0, 2, 4))
    source = image.convert("RGBA").convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    if mode == "PA":
        source.putalpha(image.getchannel("A"))
        assert source.mode == "PA"
    pixels = np.asarray(opened(source))
    assert np.abs(pixels[0, 0].astype(int) - 100).max() <= 3
    assert pixels[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("file_format", ["GIF", "PNG"])
def test_a_transparent_colour_of_a_palette_is_white(file_format: str) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (4, 0, 8, 8))
    pixels = np.asarray(opened(stored(image, file_format, transparency=0)))
    assert pixels[4, 1].tolist() == [255, 255, 255]
    assert pixels[4, 6].tolist() == [200, 0, 0]


def test_a_transparent_colour_without_palette_is_white() -> None:
    assert seen(opened(stored(corners(), transparency=RED))) == [WHITE, GREEN, BLUE, WHITE]
    grey = Image.fromarray(np.array([[7, 99]], dtype=np.uint8))
    assert np.asarray(opened(stored(grey, transparency=7)))[0, :, 0].tolist() == [255, 99]
    deep = Image.fromarray(np.array([[700, 25700]], dtype=np.uint16))
    assert np.asarray(opened(stored(deep, transparency=700)))[0, :, 0].tolist() == [255, 100]


# Modes


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", None])
@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4"])
def test_16_bit_grey_is_scaled_to_8(file_format: str | None, dtype: str) -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=dtype)
    image = Image.fromarray(levels)
    if file_format == "PNG" and dtype == "<i4":
        file_format = None  # Pillow writes no such PNG
    if file_format == "TIFF" and dtype == ">u2":
        image = Image.frombytes("I;16B", (6, 1), levels.tobytes())
    source: ImageSource = image if file_format is None else stored(image, file_format)
    assert np.asarray(opened(source))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("values", [[0.0, 0.5, 1.0], [0.0, 127.6, 255.0]])
def test_floating_grey(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert np.asarray(opened(image))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_show_the_same_colours(mode: str) -> None:
    image = corners().convert(mode)
    assert np.abs(np.array(seen(opened(image))) - np.array(seen(image.convert("RGB")))).max() == 0


def test_lab() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(corners(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab is not None
    assert np.abs(np.array(seen(opened(lab))) - np.array(CORNERS)).max() <= 25  # 8 bits of Lab are coarse


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_shown(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    content = stored(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(np.asarray(opened(content))[4, 4].astype(int) - RED).max() <= 4
    moved = Image.open(io.BytesIO(content))
    moved.seek(1)
    assert np.abs(np.asarray(opened(moved))[4, 4].astype(int) - GREEN).max() <= 4
    assert moved.tell() == 1


# What is refused


def refused(source: Any, *shown: str, limits: MediaLimits = LIMITS) -> None:
    with pytest.raises(MediaError) as caught:
        open_image(source, limits=limits)
    assert caught.value.hint
    for part in shown:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow-heif"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"GIF89a", "damaged"),
        (b"just some text", "not a picture"),
    ],
)
def test_what_is_no_picture(content: bytes, shown: str) -> None:
    refused(content, shown)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_picture_cut_short_is_refused(file_format: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = stored(noise, file_format)
    refused(content[: int(len(content) * share)], "damaged or cut short")


def test_a_pillow_picture_whose_file_is_cut_short_is_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    refused(Image.open(io.BytesIO(stored(noise)[:6000])), "object of class PngImageFile", "cut short")


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (Image.new("RGB", (0, 5)), "0 x 5"),
        (np.zeros((0, 5, 3), dtype=np.uint8), "5 x 0"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), "[2, 8, 8, 3]"),
        (np.zeros((8, 8, 2), dtype=np.uint8), "[8, 8, 2]"),
        (np.zeros(8, dtype=np.uint8), "[8]"),
        (np.zeros((8, 8), dtype=np.int64), "int64"),
        (np.full((8, 8), 255.0), "from 255 to 255"),
        (np.full((8, 8), np.nan), "nan"),
        (torch.full((3, 8, 8), -0.5), "-0.5"),
        (np.array([["a"]]), "<U1"),
        (Image.fromarray(np.array([[70000]], dtype=np.int32)), "70000"),
        (Image.fromarray(np.array([[-1.0]], dtype=np.float32)), "-1"),
        (None, "NoneType"),
        ([[1, 2], [3, 4]], "class list"),
    ],
)
def test_what_is_no_picture_in_memory(source: Any, shown: str) -> None:
    refused(source, shown)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "JPEG", "WEBP", "TIFF"])
def test_too_many_pixels_are_refused_before_they_are_decoded(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.new("RGB", (50, 40)), file_format)
    given = Image.open(io.BytesIO(content))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (content, given):
        refused(source, "50 x 40 = 2000", "max_pixels=1999", limits=MediaLimits(max_pixels=1999))


def test_too_many_pixels_of_an_array_are_refused() -> None:
    refused(np.zeros((40, 50), dtype=np.uint8), "max_pixels=1999", limits=MediaLimits(max_pixels=1999))


def test_the_limit_is_the_calls_own_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(corners())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(content).size == (40, 24)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("content", [b"P", b"abc", b"\x89P", b"BM"])
def test_a_file_of_a_few_bytes_is_refused(content: bytes) -> None:
    with pytest.raises(MediaError):
        open_image(content, limits=MediaLimits())
