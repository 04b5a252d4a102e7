"""What a clip is before its frames are decoded, and which of them the model is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from ernie45.errors import MediaError
from ernie45.vision.settings import VisionSettings

MAX_SECONDS = 24 * 3600  # what a broken clock in a file claims is more than that
MAX_FRAMES = 432_000  # two hours at 60 a second; the times of that many take 3.5 MB
MAX_DECODED_PIXELS = 10**11  # some five minutes of decoding; an hour of 1080p takes about half of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """The frames of a clip, not decoded yet.

    `times` has one number for each frame: seconds after the first one, never falling. `seconds` is how long all of them
    last, `size` the width and height in pixels. `read` takes rising frame numbers and decodes just these, one after the
    other, as RGB pictures.
    """

    times: Sequence[float]
    seconds: float
    size: tuple[int, int]
    read: Callable[[Sequence[int]], Iterator[Image.Image]]

    def __post_init__(self) -> None:
        if len(self.times) > MAX_FRAMES:
            raise too_many_frames()
        if not self.times:
            raise MediaError("the clip has no frames", hint="give at least one frame")
        if not 0 < self.seconds <= MAX_SECONDS:
            raise MediaError(
                f"the clip lasts {self.seconds:g} seconds, and 0 to {MAX_SECONDS} are allowed",
                hint="cut it, or mend its times",
            )


def too_many_frames() -> MediaError:
    """What a clip beyond MAX_FRAMES is refused with."""
    return MediaError(f"the clip has more than {MAX_FRAMES} frames", hint="cut it, or give fewer of its frames")


def check_work(num_frames: int, size: tuple[int, int]) -> None:
    """Refuse to decode `num_frames` frames of `size` if that is beyond MAX_DECODED_PIXELS."""
    num_pixels = num_frames * size[0] * size[1]
    if num_pixels > MAX_DECODED_PIXELS:
        raise MediaError(
            f"the clip needs {num_frames} frames of {size[0]} x {size[1]} decoded, {num_pixels:.3g} pixels, "
            f"and {MAX_DECODED_PIXELS:.3g} are allowed",
            hint="cut it, or make it smaller",
        )


def sample_frames(num_frames: int, seconds: float, settings: VisionSettings) -> list[int]:
    """Which of a clip's `num_frames` frames the model is shown: rising frame numbers, the first always among them.

    Baidu's rule (FastDeploy, "leading"): the frame nearest to each multiple of 1 / `frames_per_second` (a tie goes to
    the even number). Where that makes fewer than `min_frames` whole intervals, or more than `max_frames` frames, the
    clip is cut into that many equal parts instead and the first frame of each is taken. A clip that has no more frames
    than asked for is shown whole, where FastDeploy would repeat frames of a slow one.
    """
    asked = seconds * settings.frames_per_second
    if int(asked) < settings.min_frames:
        return _leading(num_frames, settings.min_frames)
    if math.ceil(asked) > settings.max_frames:
        return _leading(num_frames, settings.max_frames)
    if asked >= num_frames:
        return list(range(num_frames))
    step = num_frames / asked
    numbers = [round(part * step) for part in range(math.ceil(asked))]
    return [number for number in numbers if number < num_frames]


def _leading(num_frames: int, num_parts: int) -> list[int]:
    """The first frame of each of `num_parts` equal parts."""
    num_parts = min(num_parts, num_frames)
    return [part * num_frames // num_parts for part in range(num_parts)]
