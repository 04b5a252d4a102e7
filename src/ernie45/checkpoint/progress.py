"""A progress bar in bytes, for downloads and loading."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[[int], None]
"""Called with the number of bytes just done; may be called from several threads."""


@contextmanager
def byte_progress(description: str, total_bytes: int, *, show: bool) -> Iterator[Advance]:
    """Show a bar on standard error while the block runs, and give the block a function that advances it.

    Nothing is printed unless `show` is set and there is someone to see it: a terminal or a notebook.
    """
    if not show or not (sys.stderr.isatty() or _in_notebook()):
        yield lambda num_bytes: None
        return

    # Imported here because tqdm.auto looks for notebook widgets, which takes a while.
    from tqdm.auto import tqdm

    lock = threading.Lock()
    with tqdm(total=total_bytes, desc=description, unit="B", unit_scale=True) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        yield advance


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
