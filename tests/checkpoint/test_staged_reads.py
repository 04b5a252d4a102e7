"""What is staged is what the files hold, wherever it begins and ends; what cannot be read is said, and never used."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.large_pages import map_large_pages
from ernie45.checkpoint.staged_reads import BLOCK_BYTES, StagedReader
from ernie45.errors import CheckpointError, CorruptFileError, OutOfMemoryError

needs_direct = pytest.mark.skipif(sys.platform != "linux", reason="reads past the page cache are Linux's")


@pytest.fixture(scope="module")
def content() -> bytes:
    """Bytes that never repeat; their number is no multiple of a block."""
    return random.Random(0).randbytes(1_000_003)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.fixture(params=["direct", "refused at opening", "refused at reading"])
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file system under the tests is, and as ones that refuse direct reads are."""
    if request.param == "refused at opening":
        refuse_direct_opens(monkeypatch, errno.EINVAL)
    elif request.param == "refused at reading":
        refuse_direct_reads(monkeypatch, errno.EOPNOTSUPP)


@pytest.fixture(params=["room", "no room"])
def room(request: pytest.FixtureRequest) -> memoryview | None:
    """Where an expert is to lie, or nothing."""
    return room_of(1 << 20) if request.param == "room" else None


def room_of(num_bytes: int) -> memoryview:
    """Memory that begins with a page."""
    return memoryview(map_large_pages(1 << 20, "for a test"))[:num_bytes]


def address(content: memoryview) -> int:
    return int(np.asarray(content).ctypes.data)


def refuse_direct_opens(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    open_file = os.open

    def refusing(path: Path, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import fcntl

    read = os.preadv

    def refusing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            raise OSError(number, os.strerror(number))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)


def stored_at(file: Path, start: int, stop: int) -> TensorInfo:
    return TensorInfo(
        name=f"w{start}", file=file, dtype="U8", shape=(stop - start,), start=start, num_bytes=stop - start
    )


def staged_bytes(reader: StagedReader, info: TensorInfo) -> bytes:
    view = reader.view(info)
    assert view is not None
    return bytes(view)


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 4096)],
        [(1, 2)],
        [(4095, 4097)],
        [(4096, 8192)],
        [(4000, 300_001)],
        [(999_990, 1_000_003)],
        [(999_424, 999_424)],
        [(0, 1_000_003)],
        [(700, 900), (900, 5000), (5000, 5001)],
        [(900_000, 1_000_003), (100, 9000), (200_000, 200_000)],
        [(100, 200), (60_000, 61_000), (200_000, 300_000), (400_001, 400_002)],
    ],
)
def test_what_is_staged_is_what_the_file_holds(
    file: Path, content: bytes, ranges: list[tuple[int, int]], room: memoryview | None
) -> None:
    infos = [stored_at(file, *ends) for ends in ranges]
    reader = StagedReader()
    reader.stage(infos, room)
    for info, (start, stop) in zip(infos, ranges, strict=True):
        assert staged_bytes(reader, info) == content[start:stop]
        target = bytearray(stop - start)
        assert reader.read(file, start, memoryview(target)) == stop - start
        assert bytes(target) == content[start:stop]


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize(
    ("start", "stop", "num_blocks"),
    [(0, 4096, 1), (1, 2, 1), (4095, 4097, 2), (64, 8192, 2), (4032, 12_289, 4), (12_352, 1_000_003, 242)],
)
def test_it_lies_in_the_room_if_its_blocks_fit(
    file: Path, content: bytes, start: int, stop: int, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, info, room = StagedReader(), stored_at(file, start, stop), room_of(num_blocks * BLOCK_BYTES)
    with monkeypatch.context() as watched:
        watched.setattr("ernie45.checkpoint.staged_reads.map_large_pages", lambda *wanted: pytest.fail("a buffer"))
        reader.stage([info], room)
    view = reader.view(info)
    assert view is not None
    assert address(view) - address(room) == start % BLOCK_BYTES
    assert bytes(view) == content[start:stop]
    too_small = room_of(num_blocks * BLOCK_BYTES - 1)
    reader.stage([info], too_small)
    assert staged_bytes(reader, info) == content[start:stop]
    assert not any(too_small)
    assert bytes(view) == content[start:stop], "what lies in a room stays there"


def test_ranges_that_lie_far_apart_have_blocks_of_their_own_in_a_room(file: Path, content: bytes) -> None:
    infos = [stored_at(file, 700_100, 700_300), stored_at(file, 100, 9000)]
    room = room_of(4 * BLOCK_BYTES)
    reader = StagedReader()
    reader.stage(infos, room)
    views = [reader.view(info) for info in infos]
    assert [None if view is None else address(view) - address(room) for view in views] == [
        3 * BLOCK_BYTES + 700_100 % BLOCK_BYTES,
        100,
    ]
    assert [view and bytes(view) for view in views] == [content[700_100:700_300], content[100:9000]]


def test_tensors_of_several_files_are_staged_together(tmp_path: Path, content: bytes) -> None:
    infos = []
    for number in (2, 0, 1):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content[number:])
        infos += [stored_at(path, 5, 10_000), stored_at(path, 500_000, 500_001)]
    reader = StagedReader()
    reader.stage(infos)
    for info in infos:
        number = int(info.file.stem)
        assert staged_bytes(reader, info) == content[number:][info.start : info.start + info.num_bytes]


def test_neighbours_are_read_at_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[int] = []
    read = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        starts.append(offset)
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    reader = StagedReader()
    reader.stage([stored_at(file, 9000, 9500), stored_at(file, 8200, 9000), stored_at(file, 60_000, 70_000)])
    assert len(starts) == 1
    reader.stage([stored_at(file, 8200, 9000), stored_at(file, 90_000, 91_000)])
    assert len(starts) == 3


@needs_direct
def test_reads_go_past_the_page_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_used: list[int] = []
    open_file = os.open

    def recording(path: Path, flags: int, *arguments: Any, **options: Any) -> int:
        flags_used.append(flags)
        return open_file(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", recording)
    StagedReader().stage([stored_at(file, 100, 200_000)])
    assert flags_used[0] & os.O_DIRECT


@needs_direct
def test_where_they_cannot_pages_are_dropped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[int, int]] = []
    refuse_direct_opens(monkeypatch, errno.EINVAL)

    def recording(descriptor: int, start: int, num_bytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((start, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", recording)
    StagedReader().stage([stored_at(file, 100, 200_000), stored_at(file, 300_000, 300_010)])
    assert dropped == [(100, 199_900), (300_000, 10)]


def test_staging_drops_what_was_staged_before_and_uses_its_memory_again(file: Path, content: bytes) -> None:
    reader = StagedReader()
    large, small = stored_at(file, 10, 500_000), stored_at(file, 700_001, 700_101)
    reader.stage([large])
    view = reader.view(large)
    assert view is not None
    reader.stage([small])
    assert reader.view(large) is None
    assert staged_bytes(reader, small) == content[700_001:700_101]
    reader.stage([large])
    again = reader.view(large)
    assert again is not None
    assert torch.frombuffer(again, dtype=torch.uint8).data_ptr() == torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    assert bytes(again) == content[10:500_000]


@pytest.mark.usefixtures("any_file_system")
def test_what_is_not_staged_is_read_from_its_file(file: Path, content: bytes) -> None:
    reader = StagedReader()
    reader.stage([stored_at(file, 10, 20)])
    target = bytearray(100)
    assert reader.read(file, 15, memoryview(target)) == 100
    assert bytes(target) == content[15:115]
    assert reader.read(file, len(content) - 30, memoryview(target)) == 30
    assert bytes(target[:30]) == content[-30:]
    assert reader.view(stored_at(file, 15, 21)) is None
    assert reader.view(stored_at(file.with_name("other"), 10, 20)) is None


@pytest.mark.usefixtures("any_file_system")
def test_short_reads_are_continued(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return read(descriptor, [buffers[0][: 3 * 4096]], offset)

    monkeypatch.setattr(os, "preadv", short)
    reader, info = StagedReader(), stored_at(file, 4000, len(content))
    reader.stage([info])
    assert staged_bytes(reader, info) == content[4000:]


@pytest.mark.usefixtures("any_file_system")
@pytest.mark.parametrize("left", [0, 100, 5000, 100_000, 199_999])
def test_a_truncated_file_is_an_error_until_it_is_whole(
    file: Path, content: bytes, left: int, room: memoryview | None
) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    reader.stage([info], room)
    file.write_bytes(content[:left])
    with pytest.raises(CorruptFileError, match="is cut short") as caught:
        reader.stage([info], room)
    assert str(file) in caught.value.message
    assert f"{left} in all" in caught.value.message
    assert reader.view(info) is None
    file.write_bytes(content)
    reader.stage([info], room)
    assert staged_bytes(reader, info) == content[5000:200_000]


@pytest.mark.usefixtures("any_file_system")
def test_a_file_that_is_gone_is_an_error_until_it_is_back(file: Path, content: bytes) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    reader.stage([info])
    away = file.rename(file.with_name("away"))
    with pytest.raises(CheckpointError, match="No such file") as caught:
        reader.stage([info])
    assert str(file) in caught.value.message
    with pytest.raises(CheckpointError, match="No such file"):
        reader.read(file, 5000, memoryview(bytearray(10)))
    away.rename(file)
    reader.stage([info])
    assert staged_bytes(reader, info) == content[5000:200_000]


def test_a_file_that_may_not_be_opened_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_opens(monkeypatch, errno.EACCES)
    if not hasattr(os, "O_DIRECT"):
        file.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        StagedReader().stage([stored_at(file, 0, 10)])
    assert str(file) in caught.value.message


def test_a_failing_disk_is_an_error_until_it_works(
    file: Path, content: bytes, room: memoryview | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, info = StagedReader(), stored_at(file, 5000, 200_000)
    with monkeypatch.context() as broken:

        def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        broken.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)) as caught:
            reader.stage([info], room)
        assert str(file) in caught.value.message
        assert reader.view(info) is None
    reader.stage([info], room)
    assert staged_bytes(reader, info) == content[5000:200_000]


def test_what_no_memory_can_hold_is_an_error(file: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=f"{1 << 60:,}"):
        StagedReader().stage([stored_at(file, 0, 1 << 60)])


def test_two_readers_work_at_once(file: Path, content: bytes) -> None:
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        draw, reader = random.Random(seed), StagedReader()
        for _ in range(100):
            start = draw.randrange(len(content))
            stop = draw.randrange(start, len(content) + 1)
            info = stored_at(file, start, stop)
            reader.stage([info])
            if staged_bytes(reader, info) != content[start:stop]:
                wrong.append((start, stop))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
