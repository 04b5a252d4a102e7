"""Open a picture from anything that users have, as an upright RGB picture, within limits."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision.modes import array_size, from_array, to_rgb
from ernie45.vision.sources import FileSource, read_source, source_name

ImageSource = FileSource | Image.Image | np.ndarray[Any, Any] | torch.Tensor

# Those that Pillow reads from memory, each known by its first bytes and with its true size in its header. Not among
# them: EPS, which runs a program; ICO and ICNS, whose size shows late; and those that any file could be (TGA, PCD).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI")

_ORIENTATION = 0x0112  # Exif 2.32, section 4.6.4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHER_FILES = (
    (b"<", "this is text, such as a web page or an SVG drawing; give the address of the picture, or draw it as PNG"),
    (b"%PDF", "this is a PDF; make pictures of its pages first"),
    (b"%!PS", "this is PostScript; make a PNG of it first"),
    (b"\x00\x00\x01\x00", "this is an icon file; save it as PNG first"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def open_image(source: ImageSource, *, limits: MediaLimits) -> Image.Image:
    """Open a picture as RGB, upright by its Exif orientation, what is transparent on white, 16-bit grey scaled to 8.

    `source` is a path, an "http(s)://" URL, a base64 "data:" URI, the bytes of a file, a Pillow picture, or an array or
    tensor ([H, W], [H, W, C] or [C, H, W]; bool, uint8, uint16 or floating from 0 to 1). Of an animated file it is the
    first frame, of a Pillow picture the current one. The source is not changed; a Pillow picture that needs no
    conversion is returned itself.

    Raises:
        MediaError: it is missing, unreadable, cut short, no picture, or beyond a limit, which is named.
    """
    name = source_name(source)
    if isinstance(source, Image.Image):
        return _finished(source, name, limits)
    if isinstance(source, np.ndarray | torch.Tensor):
        _check_size(array_size(source, name), name, limits)
        return to_rgb(from_array(source, name), name)
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        with io.BytesIO(read_source(source, limits, kind="image")) as file:
            return _finished(_identified(file, name), name, limits)
    raise MediaError(
        f"an {name} is no picture",
        hint="give a path, a URL, bytes, a PIL.Image, a numpy array or a torch tensor",
    )


def _identified(file: io.BytesIO, name: str) -> Image.Image:
    """The picture with only its header read. Image.open is not used, as its own limit is one for the whole program."""
    prefix = file.read(16).ljust(16, b"\0")  # some formats look at more bytes than a short file has
    for format_name in FORMATS:
        if format_name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN.get(format_name, (None, None))
        if factory is None or accepts is None or accepts(prefix) is not True:
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except Exception as error:  # damaged headers end in any class, struct.error and KeyError among them
            raise _damaged(name, error) from error
    hint = f"formats that can be read: {', '.join(FORMATS)}"
    for start, reason in _OTHER_FILES:
        if prefix.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            hint = reason
    if prefix[8:12] in _HEIF_BRANDS:
        hint = "this is HEIF, as iPhones write it; install pillow-heif, open it with that, and pass the picture"
    raise MediaError(f"{name} is not a picture that can be read; it begins with {prefix!r}", hint=hint)


def _finished(image: Image.Image, name: str, limits: MediaLimits) -> Image.Image:
    _check_size(image.size, name, limits)
    try:
        image.load()
        turn = _turn(image)
        rgb = to_rgb(image, name)
    except MediaError:
        raise
    except Exception as error:  # as above: what Pillow meets in damaged data
        raise _damaged(name, error) from error
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a picture is shown as it is stored when its Exif block is damaged
        return None


def _check_size(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name}: the picture is {width} x {height} pixels, so that nothing can be seen", hint=_CHECK)
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name}: {width} x {height} = {width * height} pixels are more than max_pixels={limits.max_pixels}",
            hint="make it smaller, or raise MediaLimits.max_pixels if it can be trusted",
        )


_CHECK = "check how the file was made or sent"


def _damaged(name: str, error: Exception) -> MediaError:
    reason = str(error) or type(error).__name__
    return MediaError(f"{name}: the picture is damaged or cut short: {reason:.200}", hint=_CHECK)
