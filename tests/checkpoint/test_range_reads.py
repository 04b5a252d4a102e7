"""Byte ranges arrive whole and in place, whatever the pieces, and no thread writes after a read has ended."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from ernie45.checkpoint.range_reads import RangeReader

PIECE_BYTES = 4 << 20


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Two and a half pieces of bytes that never repeat."""
    content = random.Random(0).randbytes(PIECE_BYTES * 5 // 2)
    path = tmp_path_factory.mktemp("ranges") / "weights.bin"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("start", [0, 1, PIECE_BYTES - 3])
@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, PIECE_BYTES * 3 // 2])
def test_a_range_is_what_the_file_holds(stored: tuple[Path, bytes], start: int, num_bytes: int) -> None:
    path, content = stored
    target = bytearray(num_bytes + 2)
    advanced: list[int] = []
    done = RangeReader(advanced.append).read(path, start, memoryview(target)[1:-1])
    assert done == sum(advanced) == num_bytes
    assert bytes(target) == b"\0" + content[start : start + num_bytes] + b"\0"


def test_a_file_that_ends_early_gives_what_it_has(stored: tuple[Path, bytes]) -> None:
    path, content = stored
    target = bytearray(2 * PIECE_BYTES)
    start = len(content) - PIECE_BYTES - 7
    assert RangeReader().read(path, start, memoryview(target)) == PIECE_BYTES + 7
    assert bytes(target[: PIECE_BYTES + 7]) == content[start:]


def test_a_cancelled_read_leaves_no_thread_at_work(stored: tuple[Path, bytes]) -> None:
    path, content = stored
    busy = threading.Event()

    def advance(num_bytes: int) -> None:
        if not busy.is_set():
            busy.set()
            raise CancelledError
        time.sleep(0.05)  # other pieces end later than the one that was cancelled

    target = bytearray(len(content))
    with pytest.raises(CancelledError):
        RangeReader(advance).read(path, 0, memoryview(target))
    after = bytes(target)
    time.sleep(0.2)
    assert bytes(target) == after


def test_many_threads_read_at_once(stored: tuple[Path, bytes]) -> None:
    path, content = stored
    reader = RangeReader()
    wrong: list[int] = []

    def read(start: int) -> None:
        target = bytearray(PIECE_BYTES + 11)
        reader.read(path, start, memoryview(target))
        if bytes(target) != content[start : start + len(target)]:
            wrong.append(start)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pieces_are_read_at_once(stored: tuple[Path, bytes]) -> None:
    path, content = stored
    at_work: set[int] = set()

    def advance(num_bytes: int) -> None:
        at_work.add(threading.get_ident())
        time.sleep(0.05)  # long enough for the other pieces to begin

    assert RangeReader(advance).read(path, 0, memoryview(bytearray(len(content)))) == len(content)
    assert len(at_work) == 3
    assert threading.get_ident() not in at_work
