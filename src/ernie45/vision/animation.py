"""Animated GIF, WebP and PNG pictures as clips."""

from __future__ import annotations

import contextlib
import io
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence

from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.vision.clips import MAX_FRAMES, Clip, check_work, too_many_frames
from ernie45.vision.image import open_image

STILL_SECONDS = 0.1  # how long browsers show a frame that claims to last no time


def identify_animation(content: bytes) -> Image.Image | None:
    """The picture of a file's bytes, only its header read, where they are a GIF, PNG or WebP; None of any other file.

    Raises MediaError for a damaged header.
    """
    factory: Callable[[io.BytesIO, str], Image.Image]
    if content.startswith(b"GIF8"):
        factory = GifImageFile
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        factory = PngImageFile
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        factory = WebPImageFile
    else:
        return None
    with _damage_reported():
        return factory(io.BytesIO(content), "")


def open_animation(image: Image.Image, *, limits: MediaLimits) -> Clip:
    """The clip of a Pillow picture, animated or not; each frame lasts as long as the picture says, or 0.1 seconds.

    All frames are decoded for their times, one at a time. The picture's current frame stays what it is.
    Raises MediaError: damaged, or beyond a limit; then or when reading.
    """
    if image.width * image.height > limits.max_pixels:
        raise MediaError(
            f"the clip's frames are {image.width} x {image.height}, more than max_pixels={limits.max_pixels}",
            hint="make it smaller, or raise MediaLimits.max_pixels if it can be trusted",
        )
    with _damage_reported():
        num_frames = int(getattr(image, "n_frames", 1))  # a picture made in memory has none
    if num_frames > MAX_FRAMES:
        raise too_many_frames()
    check_work(2 * num_frames, image.size)  # for the times, and for the pixels
    seconds = [_seconds(image) for _ in _shown(image, range(num_frames), num_frames)]

    def read(numbers: Sequence[int]) -> Iterator[Image.Image]:
        for _ in _shown(image, numbers, num_frames):
            yield open_image(image.copy(), limits=limits)

    times = array("d", itertools.accumulate(seconds, initial=0.0))
    total = times.pop()
    return Clip(times=times, seconds=total, size=image.size, read=read)


def _shown(image: Image.Image, numbers: Sequence[int], num_frames: int) -> Iterator[int]:
    """Make each of these rising frames the picture's current one, and in the end the one that it was.

    Frames are loaded one by one to the last before going back: Pillow loses count in a PNG that it leaves midway.
    """
    before, wanted = image.tell(), set(numbers)
    try:
        _show_all(image, range(before + 1, num_frames))
        for number in range(numbers[-1] + 1):
            _show(image, number)
            if number in wanted:
                yield number
    finally:
        with contextlib.suppress(MediaError):  # damage is reported above
            _show_all(image, range(image.tell() + 1, num_frames))
            _show_all(image, range(before + 1))


def _show_all(image: Image.Image, numbers: Sequence[int]) -> None:
    for number in numbers:
        _show(image, number)


def _show(image: Image.Image, number: int) -> None:
    with _damage_reported(number):
        image.seek(number)
        image.load()


def _seconds(image: Image.Image) -> float:
    milliseconds = image.info.get("duration", 0)
    return milliseconds / 1000 if isinstance(milliseconds, int | float) and milliseconds > 0 else STILL_SECONDS


@contextlib.contextmanager
def _damage_reported(number: int | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged pictures end in any class, struct.error and KeyError among them
        where = "" if number is None else f" at its frame {number}"
        reason = str(error) or type(error).__name__
        raise MediaError(
            f"the animated picture is damaged or cut short{where}: {reason:.200}", hint="make or fetch it anew"
        ) from error
