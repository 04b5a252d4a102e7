"""A disk that fills up."""

from __future__ import annotations

import errno
import os

import pytest


def fill_disk_after(num_bytes: int, patch: pytest.MonkeyPatch) -> None:
    """Writes at positions fail as on a full disk once so many bytes are written; the last one is cut short."""
    whole, left = os.pwrite, num_bytes

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = whole(descriptor, data[:left], position)
        left -= written
        return written

    patch.setattr(os, "pwrite", pwrite)
