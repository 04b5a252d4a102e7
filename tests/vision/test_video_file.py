"""Video files: which frames are read, when they are shown, and what is refused."""

from __future__ import annotations

import builtins
import random
import resource
import sys
from typing import Any

import pytest
from PIL import Image

from ernie45.errors import MediaError, UnsupportedError
from ernie45.vision import clips, video_file
from ernie45.vision.clips import Clip
from ernie45.vision.video_file import open_video_file
from tests.clip_files import CODECS, HEIGHT, WIDTH, clip_file, frame_number, sound_file, turned

KINDS: dict[str, dict[str, Any]] = {
    "mp4": {"container": "mp4", "codec": "mpeg4"},
    "avi": {"container": "avi", "codec": "mpeg4"},
    "mkv": {"container": "matroska", "codec": "mpeg4"},
    "ts": {"container": "mpegts", "codec": "mpeg2video"},
    "webm": {"container": "webm", "codec": "libvpx-vp9"},
    "h264": {"container": "mp4", "codec": "libx264", "codec_options": {"g": "12", "bf": "3", "crf": "10"}},
    "open-gop": {
        "container": "mp4",
        "codec": "libx264",
        "codec_options": {"x264-params": "open-gop=1:keyint=10:bframes=3"},
    },
}


def opened(content: bytes) -> Clip:
    return open_video_file(content, max_pixels=10_000_000)


def made(kind: str, num_frames: int, **options: Any) -> bytes:
    codec = KINDS[kind]["codec"]
    if codec not in CODECS:
        pytest.skip(f"this PyAV has no {codec}")
    return clip_file(num_frames, **{**KINDS[kind], **options})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind: str) -> None:
    clip = opened(made(kind, 100))
    assert len(clip.times) == 100
    assert clip.times[0] == 0
    assert clip.times[99] == pytest.approx(3.96, abs=1e-3)
    assert clip.seconds == pytest.approx(4.0, abs=1e-3)
    assert clip.size == (WIDTH, HEIGHT)
    numbers = [0, 1, 9, 10, 11, 29, 47, 48, 60, 88, 98, 99]
    assert [frame_number(frame) for frame in clip.read(numbers)] == numbers


@pytest.mark.parametrize("numbers", [[0], [99], [30, 31, 32], [5, 95], [*range(0, 100, 7)], [*range(100)]])
def test_any_frames_can_be_asked_for(numbers: list[int]) -> None:
    for kind in ("h264", "open-gop"):
        assert [frame_number(frame) for frame in opened(made(kind, 100)).read(numbers)] == numbers


def test_no_more_is_decoded_than_the_frames_need(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every tenth frame is a key frame, and none is shown out of order.
    clip = opened(clip_file(100, codec_options={"g": "10", "bf": "0", "sc_threshold": "1000000000"}))
    decoded: list[int] = []
    monkeypatch.setattr(video_file, "check_work", lambda num_frames, size: decoded.append(num_frames))
    for numbers in ([0], [20], [23], [23, 25], [9, 10], [0, 50, 92]):
        assert [frame_number(frame) for frame in clip.read(numbers)] == numbers
    assert decoded == [1, 1, 4, 6, 11, 5]


def test_a_variable_frame_rate_has_the_times_of_the_file() -> None:
    milliseconds = [0, 40, 500, 520, 3000, 3500]
    clip = opened(clip_file(6, container="matroska", milliseconds=milliseconds))
    assert list(clip.times) == pytest.approx([0.0, 0.04, 0.5, 0.52, 3.0, 3.5])
    assert [frame_number(frame) for frame in clip.read(range(6))] == list(range(6))


def test_times_count_from_the_first_frame() -> None:
    clip = opened(clip_file(3, container="matroska", milliseconds=[5000, 5040, 5080]))
    assert list(clip.times) == pytest.approx([0.0, 0.04, 0.08])
    assert clip.seconds == pytest.approx(0.12)


def test_one_frame() -> None:
    clip = opened(clip_file(1))
    assert list(clip.times) == [0.0]
    assert [frame_number(frame) for frame in clip.read([0])] == [0]


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), None),
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # a phone held upright: shown turned clockwise
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
    ],
)
def test_frames_are_turned_as_the_file_says(matrix: tuple[int, int, int, int], turn: Image.Transpose | None) -> None:
    file = clip_file(2)
    (plain,) = opened(file).read([1])
    clip = opened(turned(file, *matrix))
    (frame,) = clip.read([1])
    expected = plain if turn is None else plain.transpose(turn)
    assert clip.size == expected.size
    assert frame.tobytes() == expected.tobytes()


def test_a_phone_clip_has_its_left_side_on_top() -> None:
    clip = opened(turned(clip_file(2), 0, 1, -1, 0))
    (frame,) = clip.read([1])
    assert frame.size == (HEIGHT, WIDTH)
    top, bottom = frame.getpixel((5, 5)), frame.getpixel((5, WIDTH - 5))
    assert isinstance(top, tuple)
    assert isinstance(bottom, tuple)
    assert top[0] // 16 == 1  # the left grey of frame 1
    assert bottom[0] // 16 == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a video" * 100, "cannot be decoded"),
        (b"\0" * 5000, "cannot be decoded"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:1/part.ts\n#EXT-X-ENDLIST\n", "cannot be decoded"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be decoded"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        opened(content)


def test_sound_only() -> None:
    with pytest.raises(MediaError, match="no pictures"):
        opened(sound_file())


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6])
@pytest.mark.parametrize("kind", ["mp4", "avi", "mkv"])
def test_a_file_cut_short_is_refused(kind: str, share: float) -> None:
    content = made(kind, 150)
    with pytest.raises(MediaError, match=r"cut short|cannot be decoded|no pictures|no frame"):
        opened(content[: int(len(content) * share)])


def test_a_cut_names_what_is_missing() -> None:
    content = made("mkv", 150)
    with pytest.raises(MediaError, match=r"it says 6\.0 seconds, and has [23]\.\d"):
        opened(content[: len(content) // 2])
    content = made("avi", 150)
    with pytest.raises(MediaError, match=r"its frame \d+ is not whole"):
        opened(content[: len(content) // 2 + 3])


def test_a_recording_that_begins_between_key_frames_begins_at_the_next_one() -> None:
    content = made("ts", 100, codec_options={"g": "20", "bf": "0"})
    whole = opened(content)
    clip = opened(content[188 * 30 :])
    assert 20 <= len(clip.times) < len(whole.times)
    assert clip.times[0] == 0
    assert frame_number(next(clip.read([0]))) == 100 - len(clip.times)


def test_limits() -> None:
    file = clip_file(3)
    with pytest.raises(MediaError, match="64 x 48, more than max_pixels=3071"):
        open_video_file(file, max_pixels=3071)
    assert open_video_file(file, max_pixels=3072).size == (64, 48)


def test_too_many_frames_and_too_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    file = clip_file(30)
    monkeypatch.setattr(clips, "MAX_DECODED_PIXELS", 20 * 64 * 48)
    clip = opened(file)
    with pytest.raises(MediaError, match=r"30 frames of 64 x 48|2\d frames of 64 x 48"):
        list(clip.read(range(30)))
    monkeypatch.setattr(video_file, "MAX_FRAMES", 29)
    with pytest.raises(MediaError, match="more than"):
        opened(file)


def test_pyav_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_import = builtins.__import__

    def without_av(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return plain_import(name, *arguments, **options)

    file = clip_file(2)
    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(UnsupportedError, match="PyAV") as caught:
        opened(file)
    assert caught.value.hint == "pip install 'ernie45[video]'"


def test_damage_within_a_frame_is_reported_with_its_time() -> None:
    content = bytearray(made("h264", 100))
    start = content.index(b"mdat")
    for place in range(start + 200, start + 4000, 11):
        content[place] ^= 0xFF
    with pytest.raises(MediaError, match=r"at \d+\.\d\d seconds cannot be decoded|cannot be decoded"):
        list(opened(bytes(content)).read(range(100)))


@pytest.mark.slow
def test_a_hundred_corrupted_files_give_frames_or_our_error() -> None:
    originals = [made(kind, 40) for kind in ("mp4", "h264", "mkv", "avi", "webm")]
    generator = random.Random(45)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for round_number in range(100):
        content = corrupted(originals[round_number % len(originals)], generator, way=round_number // 5 % 4)
        try:
            clip = opened(content)
            frames = list(clip.read(range(0, len(clip.times), 3)))
            outcomes["read"] += 1
            assert frames[0].size == clip.size
        except MediaError:
            outcomes["refused"] += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert min(outcomes.values()) > 10, outcomes
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6


def corrupted(content: bytes, generator: random.Random, *, way: int) -> bytes:
    """Cut, flipped, with other headers, or with bytes missing."""
    changed = bytearray(content)
    if way == 0:
        return content[: generator.randrange(len(content))]
    if way == 1:
        for _ in range(generator.randrange(1, 20)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    elif way == 2:
        for _ in range(generator.randrange(1, 10)):
            changed[generator.randrange(min(1500, len(changed)))] = generator.choice([0, 127, 255])
    else:
        start = generator.randrange(len(changed))
        del changed[start : start + generator.randrange(1, 400)]
    return bytes(changed)
