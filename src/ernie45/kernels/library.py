"""The library of native kernels: found beside this file, checked, and loaded once.

csrc/build.py compiles it when the package is installed. Without it the torch implementations serve.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Final

from ernie45.errors import InvalidRequestError, UnsupportedError

VERSION: Final = 4
"""Of the C interface: E45_VERSION in csrc/ernie45.h."""

MOST_THREADS: Final = 256
"""That the kernels' pool takes: MAX_THREADS in csrc/pool.c."""

FUNCTIONS: Final = (
    *("version", "isa", "isas", "use_isa", "set_threads", "workspace_bytes", "trim"),
    *("work_alone", "make_panels", "make_int4_panels", "linear", "lookup"),
    *("attention", "mlp", "route", "experts", "add_outputs", "layers", "head"),
)
"""Those of csrc/ernie45.h, without "e45_"."""

LIBRARY_FILE: Final = Path(__file__).with_name("libernie45.dylib" if sys.platform == "darwin" else "libernie45.so")
# Where the build leaves word why there is no library.
REASON_FILE: Final = Path(__file__).with_name("not-built.txt")


def native_library() -> ctypes.CDLL | None:
    """The library, the same at each call; None where `why_not` says why there is none."""
    loaded = _loaded()
    return loaded if isinstance(loaded, ctypes.CDLL) else None


def why_not() -> str | None:
    """Why there are no native kernels; None where there are."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def instruction_sets() -> tuple[str, ...]:
    """Those that the kernels were compiled for and this machine can run, best first; empty without a library."""
    library = native_library()
    return () if library is None else tuple(library.e45_isas().decode().split(","))


def instruction_set() -> str | None:
    """The one that the kernels use, at first the best; None without a library."""
    library = native_library()
    return None if library is None else library.e45_isa().decode()


def use_instruction_set(name: str) -> None:
    """Have the kernels use one of `instruction_sets()`, in the whole process.

    Raises:
        UnsupportedError: it is none of these.
    """
    library = native_library()
    if library is None or library.e45_use_isa(name.encode()) != 0:
        names = ", ".join(map(repr, instruction_sets()))
        raise UnsupportedError(
            f"instruction set {name!r} is not available on this machine",
            hint=f"use {names}" if names else "`ernie45 doctor` says why there are no native kernels",
        )


def set_threads(num_threads: int) -> None:
    """Have the kernels run on so many threads, the caller's among them; nothing happens without a library.

    Raises:
        InvalidRequestError: fewer than one, or more than the kernels' pool takes.
    """
    library = native_library()
    if library is not None and library.e45_set_threads(num_threads) != 0:
        raise InvalidRequestError(
            f"the native kernels do not run on {num_threads} threads", hint=f"use 1 to {MOST_THREADS}"
        )


def work_alone() -> None:
    """Have the calling thread put matrices into panels by itself, beside what the kernels compute for others."""
    library = native_library()
    if library is not None:
        library.e45_work_alone()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    return open_library(LIBRARY_FILE)


def open_library(path: Path) -> ctypes.CDLL | str:
    """Load the library at `path`; returns a reason where it is not there, does not load, or is not of these sources."""
    if not path.exists():
        reason = REASON_FILE.read_text(encoding="utf-8").strip() if REASON_FILE.exists() else ""
        return f"no library was built: {reason}" if reason else "no library was built"
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: getattr(library, f"e45_{name}") for name in FUNCTIONS}
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    except AttributeError as error:  # the name of the function that is missing
        return f"{path.name} was built from other sources: {error}"
    if (version := functions["version"]()) != VERSION:
        return f"{path.name} has version {version} of the interface, and this ernie45 needs {VERSION}"
    functions["isa"].restype = functions["isas"].restype = ctypes.c_char_p
    functions["use_isa"].argtypes = [ctypes.c_char_p]
    functions["set_threads"].argtypes = [ctypes.c_int]
    return library
