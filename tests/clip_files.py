"""Small video files whose frames say their own number."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    import av
else:
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'ernie45[video]')")

WIDTH, HEIGHT = 64, 48
CODECS = av.codecs_available


def numbered_frame(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A frame that tells its number, below 256, by two greys."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = 8 + 16 * (number % 16)
    pixels[:, size[0] // 2 :] = 8 + 16 * (number // 16)
    return Image.fromarray(pixels)


def frame_number(frame: Image.Image) -> int:
    """The number of a frame, also after lossy coding."""
    left, right = (frame.getpixel((round(frame.width * share), frame.height - 2)) for share in (0.25, 0.75))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    return int(left[1]) // 16 + 16 * (int(right[1]) // 16)


def clip_file(
    num_frames: int,
    *,
    fps: int = 25,
    container: str = "mp4",
    codec: str = "mpeg4",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    """A video file of numbered frames; `milliseconds` are their times where they are not evenly spaced."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = codec_options or {}
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(numbered_frame(number, size)))
            frame.pts = number if milliseconds is None else milliseconds[number]
            frame.time_base = Fraction(1, fps) if milliseconds is None else Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def turned(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 file whose track header asks players to transform its frames by this matrix."""
    place = mp4.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return mp4[:place] + matrix + mp4[place + len(matrix) :]


def sound_file() -> bytes:
    """An MP4 file with sound only."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream: Any = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
