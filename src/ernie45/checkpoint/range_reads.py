"""Reading byte ranges of files, several pieces at a time."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, final

from ernie45.checkpoint.progress import Advance

_PIECE_BYTES = 4 << 20
_NUM_THREADS = 4  # a disk is fastest with some requests at once; from the page cache two cores copy
_AHEAD_BYTES = 128 << 20


class ByteSource(Protocol):
    """Where the bytes of files are read."""

    def read(self, path: Path, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes of a file from `start` on; returns how many there were, fewer at its end."""
        ...


def read_fully(descriptor: int, start: int, target: memoryview, *, block_bytes: int = 1) -> int:
    """Fill `target` from an open file, however many reads that takes; returns how many bytes there were, fewer at the
    end of the file. Each read begins a multiple of `block_bytes` after `start`."""
    done = 0
    while done < len(target):
        num_bytes = os.preadv(descriptor, [target[done:]], start + done)
        if num_bytes < block_bytes:
            return done + num_bytes
        done += num_bytes - num_bytes % block_bytes
    return done


@final
class RangeReader:
    """Reads ranges in pieces on threads that only read. `advance`, if given, is told the bytes of each piece.

    On Linux the system is asked to fetch what follows a range, since files are mostly read from front to back: it does
    so while the caller packs or quantises what it has.
    """

    def __init__(self, advance: Advance | None = None) -> None:
        self._advance = advance
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ernie45-reading")

    def read(self, path: Path, start: int, target: memoryview) -> int:
        """Fill `target` with the bytes of a file from `start` on; returns how many there were, fewer at its end."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if sys.platform == "linux":
                os.posix_fadvise(descriptor, start + len(target), _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            firsts = range(0, len(target), _PIECE_BYTES)
            if len(firsts) < 2:
                return self._read_piece(descriptor, start, target)
            pieces = [
                self._pool.submit(self._read_piece, descriptor, start + first, target[first : first + _PIECE_BYTES])
                for first in firsts
            ]
            try:
                return sum(piece.result() for piece in pieces)
            finally:  # none may write to the target, or read from the descriptor, after this
                for piece in pieces:
                    piece.cancel() or piece.exception()
        finally:
            os.close(descriptor)

    def _read_piece(self, descriptor: int, start: int, target: memoryview) -> int:
        done = read_fully(descriptor, start, target)
        if self._advance is not None:
            self._advance(done)
        return done
