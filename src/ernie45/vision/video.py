"""Clips from files, animated pictures, frames and arrays to what the model is shown."""

from __future__ import annotations

import dataclasses
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ernie45.errors import MediaError
from ernie45.types.limits import MediaLimits
from ernie45.types.media import Media
from ernie45.vision.animation import identify_animation, open_animation
from ernie45.vision.clips import Clip, sample_frames
from ernie45.vision.image import ImageSource, open_image
from ernie45.vision.patches import TEMPORAL_MERGE, frame_size, prepare_frames
from ernie45.vision.settings import VisionSettings
from ernie45.vision.sources import FileSource, read_source, source_name
from ernie45.vision.timestamps import draw_time
from ernie45.vision.video_file import open_video_file

Frames = Sequence[ImageSource] | np.ndarray[Any, Any] | Tensor  # the sequence is a list or a tuple
VideoSource = FileSource | Image.Image | Frames

ASSUMED_FPS = 24.0  # of frames and arrays that come without; transformers assumes it too


def prepare_video(
    source: VideoSource,
    settings: VisionSettings,
    *,
    limits: MediaLimits,
    fps: float | None = None,
    font: Path | None = None,
    max_pixels: int | None = None,
) -> Media:
    """Sample a clip's frames, write its time on each, resize them and cut them into patches.

    `source` is a video file or an animated GIF, WebP or PNG (path, URL, data URI or bytes; the latter also as a Pillow
    image), a list of frames (anything `open_image` takes), or an array or tensor [T, H, W, C] or [T, C, H, W]. `fps` is
    the frame rate of frames and arrays, 24 if None. `font` is what times are written in, None for Pillow's own.
    `max_pixels` lowers or raises the settings' limit of each frame. A frame is resized as soon as it is decoded.

    Raises:
        MediaError: what `source` is cannot be read or is beyond a limit, or its frames are not all of one size.
        UnsupportedError: a video file, and PyAV is not installed; or the font cannot be loaded.
    """
    clip = open_clip(source, limits=limits, fps=fps)
    size = frame_size(clip.size, settings, max_pixels=max_pixels)
    numbers = sample_frames(len(clip.times), clip.seconds, settings)
    frames = [
        draw_time(frame, clip.times[number], font).resize(size, Image.Resampling.BICUBIC)
        for number, frame in _equal_frames(clip, numbers)
    ]
    area = size[0] * size[1]  # the only one allowed, so that they stay as they are
    return prepare_frames(frames, dataclasses.replace(settings, min_frame_pixels=area, max_frame_pixels=area))


def probe_video(
    source: VideoSource, settings: VisionSettings, *, limits: MediaLimits, fps: float | None = None
) -> tuple[int, int, int]:
    """How many frames of a clip the model is shown (an even number), and their width and height before resizing.

    Of a file only the first frame is decoded; of an animated picture all are, one at a time. Errors as `prepare_video`.
    """
    clip = open_clip(source, limits=limits, fps=fps)
    num_frames = len(sample_frames(len(clip.times), clip.seconds, settings))
    return num_frames + num_frames % TEMPORAL_MERGE, *clip.size


def open_clip(source: VideoSource, *, limits: MediaLimits, fps: float | None = None) -> Clip:
    """What a clip is, from any source that `prepare_video` takes, with its errors."""
    if isinstance(source, list | tuple | np.ndarray | Tensor):
        return _frames_clip(source, limits, fps)
    if fps is not None:
        raise MediaError(f"fps={fps!r:.100} for a clip that has its own times", hint="give fps with frames or an array")
    if isinstance(source, Image.Image):
        return open_animation(source, limits=limits)
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise MediaError(
            f"an {source_name(source)} is no clip",
            hint="give a path, a URL, bytes, a list of frames, a numpy array or a torch tensor",
        )
    content = read_source(source, limits, kind="video")
    image = identify_animation(content)
    if image is None:
        return open_video_file(content, max_pixels=limits.max_pixels)
    return open_animation(image, limits=limits)


def _frames_clip(frames: Frames, limits: MediaLimits, fps: float | None) -> Clip:
    if isinstance(frames, np.ndarray | Tensor) and frames.ndim != 4:
        raise MediaError(
            f"a clip's array has 4 axes, and this one is {list(frames.shape)}", hint="give [T, H, W, C] or [T, C, H, W]"
        )
    rate = ASSUMED_FPS if fps is None else fps
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise MediaError(f"fps is {rate!r:.100}", hint="give the number of frames in a second, above 0")
    num_frames = len(frames)

    def read(numbers: Sequence[int]) -> Iterator[Image.Image]:
        for number in numbers:
            yield open_image(frames[number], limits=limits)

    size = open_image(frames[0], limits=limits).size if num_frames else (0, 0)
    times = array("d", (number / rate for number in range(num_frames)))
    return Clip(times=times, seconds=num_frames / rate, size=size, read=read)


def _equal_frames(clip: Clip, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    for number, frame in zip(numbers, clip.read(numbers), strict=True):
        if frame.size != clip.size:
            raise MediaError(
                f"frame {number} of the clip is {frame.width} x {frame.height}, and its first {clip.size[0]} x "
                f"{clip.size[1]}",
                hint="give frames of one size, or cut the clip there",
            )
        yield number, frame
