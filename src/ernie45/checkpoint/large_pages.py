"""Memory outside the heap, in large pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap
import sys

from ernie45.errors import OutOfMemoryError

_PAGE_BYTES = 2 * 2**20


def map_large_pages(num_bytes: int, purpose: str) -> mmap.mmap:
    """At least so many bytes, which begin with a page, and take memory as they are written to.

    Raises OutOfMemoryError, which names the `purpose`.
    """
    num_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, num_bytes)
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OutOfMemoryError(
            f"the system gave no {num_bytes:,} bytes {purpose} ({error})",
            hint="close other programs, or load a smaller model or preset; `ernie45 plan` says what fits",
        ) from None
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
