"""Frames of a video file, decoded by PyAV (FFmpeg's libraries): the ones asked for, and those that these build on."""

from __future__ import annotations

import bisect
import contextlib
import io
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ernie45.errors import ErnieError, MediaError, UnsupportedError
from ernie45.vision.clips import MAX_FRAMES, Clip, check_work, too_many_frames

if TYPE_CHECKING:
    import av.container
    import av.video.stream

# Kinds of files that hold their frames themselves. A playlist would have FFmpeg open other files or addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
MISSING_SECONDS = 0.5  # what a file may lack of the length it claims, and still not be called cut short:
MISSING_SHARE = 0.02  # that much, and this share of it
PADDING_PIXELS = 1 << 16

# What a file's display matrix (its a, b, c, d) asks of a frame; phones hold a portrait clip as a turned landscape one.
_TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def open_video_file(content: bytes, *, max_pixels: int) -> Clip:
    """The clip of a video file's bytes; its first frame is decoded, of the others only the places are read.

    Times are those of the file, from its first frame on, so that a variable frame rate is right. `max_pixels` limits
    width times height.

    Raises:
        UnsupportedError: PyAV is not installed.
        MediaError: not a video file, one without a picture, cut short, damaged, or past a limit; then or when reading.
    """
    _import_av()
    with _open(content, max_pixels) as (container, stream):
        index = _read_index(container, stream)
        if not stream.time_base:
            raise MediaError("the video file has no clock", hint="convert it with another program")
        tick = float(stream.time_base)
    file = _VideoFile(content=content, max_pixels=max_pixels, index=index, tick=tick)
    size = next(file.read([0])).size
    first = index.stamps[0]
    times = array("d", ((stamp - first) * tick for stamp in index.stamps))
    return Clip(times=times, seconds=(index.end - first) * tick or 1 / 24, size=size, read=file.read)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    """Where a file's frames are: the stamp of each packet in the order of decoding, and which can be decoded alone.

    `stamps` are those of the frames that can be decoded, rising; `end` is when the last of them ends.
    """

    packets: Sequence[int]
    keys: Sequence[int]
    stamps: Sequence[int]
    end: int

    def packets_for(self, wanted: Sequence[int]) -> bytearray:
        """One byte for each packet: whether it must be decoded for the frames of these stamps."""
        places = {stamp: place for place, stamp in enumerate(self.packets)}
        needed = bytearray(len(self.packets))
        for stamp in wanted:
            place = places[stamp]
            key = bisect.bisect_right(self.keys, place) - 1
            if stamp < self.packets[self.keys[key]] and key > 0:
                key -= 1  # shown before its key frame, it needs the one before too
            needed[self.keys[key] : place + 1] = b"\1" * (place + 1 - self.keys[key])
        return needed


@dataclass(frozen=True, kw_only=True, slots=True)
class _VideoFile:
    content: bytes
    max_pixels: int
    index: _Index
    tick: float

    def read(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these rising numbers."""
        stamps = self.index.stamps
        left = list(reversed(numbers))
        with _open(self.content, self.max_pixels) as (container, stream):
            needed = self.index.packets_for([stamps[number] for number in numbers])
            check_work(sum(needed), (stream.codec_context.width, stream.codec_context.height))
            for frame in _decoded(container, stream, needed):
                stamp = _stamp(frame)
                while left and stamp >= stamps[left[-1]]:
                    number = left.pop()
                    # a file may list a frame that is none: the one after it stands in, and no later one
                    if frame.is_corrupt or stamp > stamps[min(number + 1, len(stamps) - 1)]:
                        raise self._damaged(stamps[number])
                    _check_pixels(frame.width, frame.height, self.max_pixels)  # it may change on the way
                    yield _upright(frame)
                if not left:
                    return
        raise self._damaged(stamps[left[-1]])

    def _damaged(self, stamp: int) -> MediaError:
        seconds = (stamp - self.index.stamps[0]) * self.tick
        return MediaError(
            f"the video file is damaged: its frame at {seconds:.2f} seconds cannot be decoded",
            hint="make or fetch it anew, or cut it before that",
        )


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UnsupportedError(
            "video files are read with PyAV, which is not installed", hint="pip install 'ernie45[video]'"
        ) from error
    return av


@contextlib.contextmanager
def _open(content: bytes, max_pixels: int) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """A video file and the stream of its pictures; FFmpeg's errors become ours."""
    av = _import_av()
    # FFmpeg counts the padding of its own buffers; the limit itself is checked below
    options = {"format_whitelist": FORMATS, "max_pixels": str(2 * max_pixels + PADDING_PIXELS)}
    try:
        with av.open(io.BytesIO(content), metadata_errors="replace", options=options) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise MediaError("the video file has no pictures, only sound or text", hint="give a clip with pictures")
            context = streams[0].codec_context
            if context is None:
                raise MediaError("the video file is of a codec that PyAV cannot decode", hint="convert it to H.264")
            _check_pixels(context.width, context.height, max_pixels)
            context.options = {"max_pixels": options["max_pixels"]}
            yield container, streams[0]
    except ErnieError:
        raise
    except av.FFmpegError as error:
        raise MediaError(
            f"the video file cannot be decoded: {error.strerror}",
            hint="it is damaged, or of another kind than MP4, WebM, Matroska, AVI, MPEG, FLV or Ogg",
        ) from error


def _read_index(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> _Index:
    """Read through the file without decoding."""
    packets, keys, end, end_seconds = array("q"), array("q"), 0, 0.0
    for packet in container.demux():
        if not packet.size:
            continue
        stamp = _stamp(packet)
        if packet.time_base:
            end_seconds = max(end_seconds, float((stamp + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        if packet.is_corrupt:
            raise _cut_short(f"its frame {len(packets)} is not whole")
        if packet.is_keyframe:
            keys.append(len(packets))
        packets.append(stamp)
        end = max(end, stamp + (packet.duration or 0))
        if len(packets) > MAX_FRAMES:
            raise too_many_frames()
    claimed = (container.duration or 0) / 1e6
    if claimed - end_seconds > MISSING_SECONDS + MISSING_SHARE * claimed:
        raise _cut_short(f"it says {claimed:.1f} seconds, and has {end_seconds:.1f}")
    if not keys:
        raise MediaError("the video file has no frame that can be decoded", hint="make or fetch it anew")
    stamps = array("q", sorted({stamp for stamp in packets if stamp >= packets[keys[0]]}))
    return _Index(packets=packets, keys=keys, stamps=stamps, end=end)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise MediaError("the video file does not say how large its frames are", hint="make or fetch it anew")
    if width * height > max_pixels:
        raise MediaError(
            f"the clip's frames are {width} x {height}, more than max_pixels={max_pixels}",
            hint="make it smaller, or raise MediaLimits.max_pixels if it can be trusted",
        )


def _cut_short(how: str) -> MediaError:
    return MediaError(f"the video file is cut short or damaged: {how}", hint="copy or fetch it again, whole")


def _decoded(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, needed: bytearray
) -> Iterator[Any]:
    """The frames of the needed packets, in the order of showing."""
    context = stream.codec_context
    place, fed = 0, False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if needed[place]:
            yield from context.decode(packet)
        elif fed:  # the decoder holds frames back; they are due before it is led elsewhere
            yield from context.decode(None)
            context.flush_buffers()
        fed = bool(needed[place])
        place += 1
        if place == len(needed):
            break
    if fed:
        yield from context.decode(None)


def _stamp(timed: Any) -> int:
    """When a packet or frame is due, in ticks of its stream."""
    stamp = timed.dts if timed.pts is None else timed.pts
    if stamp is None:
        raise MediaError("the video file has frames without a time", hint="convert it with another program")
    return int(stamp)


def _upright(frame: Any) -> Image.Image:
    """The picture of a frame, turned as the file says it is to be shown."""
    image: Image.Image = frame.to_image()
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = (number >> 16 for number in struct.unpack("=5i", bytes(data)[:20]))
            turn = _TURNS.get((a, b, c, d))
            return image if turn is None else image.transpose(turn)
    return image
