"""Damaged and lying pictures end in a picture or in one of our errors, and never in much memory."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ernie45.errors import ErnieError, MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision.image import open_image
from ernie45.vision.patches import prepare_image
from ernie45.vision.settings import VisionSettings

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
DAMAGES = ("cut", "flipped", "overwritten", "repeated", "claimed")
NUM_PICTURES = 510
LIMITS = MediaLimits(max_pixels=4_000_000)
EXIF = Image.Exif()
EXIF[0x0112] = 6
MAX_MEGABYTES = 200


def stored(file_format: str, seed: int) -> bytes:
    """A small picture of one of several modes, in two frames where that is possible."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    modes = {"PNG": ("RGB", "P", "LA", "RGBA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "TIFF": ("RGB", "CMYK", "L")}
    mode = modes.get(file_format, ("RGB", "P", "L") if file_format != "WEBP" else ("RGB", "RGBA"))[seed % 2]
    options: dict[str, object] = {"exif": EXIF} if file_format in ("JPEG", "PNG", "WEBP") else {}
    if file_format == "TIFF":
        options["compression"] = ("tiff_lzw", "tiff_adobe_deflate", "packbits", None)[seed % 4]
    if file_format in ("GIF", "WEBP", "PNG") and seed % 3 == 0:
        options |= {"save_all": True, "append_images": [image.convert(mode).rotate(180)]}
    file = io.BytesIO()
    image.convert(mode).save(file, file_format, **options)
    return file.getvalue()


def damaged(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    content = bytearray(stored(FORMATS[seed % len(FORMATS)], seed))
    damage = DAMAGES[seed // len(FORMATS) % len(DAMAGES)]
    if damage == "cut":
        del content[int(rng.integers(1, len(content))) :]
    elif damage == "flipped":
        for place in rng.integers(0, len(content), int(rng.integers(1, 9))):
            content[place] ^= 1 << int(rng.integers(0, 8))
    elif damage == "overwritten":
        start = int(rng.integers(0, len(content)))
        content[start : start + 16] = rng.bytes(16)
    elif damage == "repeated":
        start = int(rng.integers(0, len(content)))
        content[start:start] = content[start : start + int(rng.integers(1, 200))]
    else:  # sizes and counts in headers, in either byte order, become huge
        start = int(rng.integers(4, min(len(content), 120)))
        content[start : start + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"][
            int(rng.integers(0, 3))
        ]
    return bytes(content)


def outcome(content: bytes) -> str:
    """Opens and prepares; what is raised beside our own errors is for the test to fail with."""
    try:
        image = open_image(content, limits=LIMITS)
    except ErnieError as error:
        return type(error).__name__ if error.hint and len(str(error)) < 1000 else f"without hint, or long: {error}"
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= LIMITS.max_pixels
    if image.width * image.height < 100_000:
        prepare_image(image, VisionSettings(), max_pixels=10_000)
    return "picture"


def run_all() -> dict[str, int]:
    """All pictures one after the other; called in a process of its own, whose memory is then known."""
    outcomes: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged Exif and TIFF fields
        for seed in range(NUM_PICTURES):
            kind = outcome(damaged(seed))
            outcomes[kind] = outcomes.get(kind, 0) + 1
    return outcomes


PROGRAM = """
import importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("hostile", sys.argv[1])
hostile = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hostile)
hostile.outcome(hostile.stored("PNG", 0))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = hostile.run_all()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(outcomes.get("picture", 0), outcomes.get("MediaError", 0), sum(outcomes.values()), (after - before) // 1024)
"""


def test_500_damaged_pictures_end_in_a_picture_or_our_error_within_memory() -> None:
    command = [sys.executable, "-c", PROGRAM, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    num_pictures, num_errors, num_all, megabytes = map(int, done.stdout.split())
    assert num_all == num_pictures + num_errors == NUM_PICTURES
    assert num_errors > NUM_PICTURES // 4
    assert num_pictures > NUM_PICTURES // 20
    assert megabytes < MAX_MEGABYTES


def test_a_warning_made_an_error_stays_ours() -> None:
    content = stored("TIFF", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in range(8, len(content), 97):
            outcome(content[:end])


# Headers that promise much


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def claiming(file_format: str, width: int, height: int) -> bytes:
    content = bytearray(stored(file_format, 1))
    if file_format == "PNG":
        return png_claiming(width, height)
    if file_format == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    elif file_format == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif file_format == "JPEG":
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "JPEG"])
def test_a_bomb_is_refused_with_the_limit(file_format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"65535 x 65500 = 4292542500 .*max_pixels=178956970"):
            open_image(claiming(file_format, 65535, 65500), limits=MediaLimits())
        with pytest.raises(MediaError, match=r"2100 x 2000 = 4200000 .*max_pixels=4000000"):
            open_image(claiming(file_format, 2100, 2000), limits=LIMITS)


def test_a_larger_limit_is_kept_where_pillows_own_is_smaller() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match="damaged or cut short"):  # not the limit: the rows are missing
            open_image(png_claiming(20_000, 10_000), limits=MediaLimits(max_pixels=300_000_000))


def test_text_that_expands_in_a_png_is_refused_or_ignored() -> None:
    good = stored("PNG", 1)
    bomb = b"key\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(bomb)) + b"zTXt" + bomb + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    with pytest.raises(MediaError, match="damaged"):
        open_image(good[:33] + chunk + good[33:], limits=LIMITS)
