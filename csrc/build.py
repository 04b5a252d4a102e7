"""Compile the native kernels into one library: `python csrc/build.py` puts it beside the package's sources.

Needs a C compiler (gcc 10, clang 9 or newer) and Python's standard library alone: the package's build hook runs this
file where nothing else is installed. A library that is newer than all sources is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
PACKAGE = SOURCES.parent / "src" / "ernie45" / "kernels"
LIBRARY_NAME = "libernie45.dylib" if sys.platform == "darwin" else "libernie45.so"
COMPILERS = ("cc", "gcc", "clang")

COMPILED_ONCE = ("api.c", "pool.c")
COMPILED_FOR_EACH_ISA = "kernels.c"
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c")
X86_FLAGS = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512vnni": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}
# Not -ffast-math, nor products joined to sums: they let the compiler change roundings, on which equal bits depend.
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
WARNINGS = ("-Wall", "-Wextra")
SANITIZE = ("-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")


class BuildError(Exception):
    """Why there is no library, in words."""


def build(folder: Path, *, sanitize: bool = False) -> Path:
    """Compile into `folder`; returns the library's path.

    Raises:
        BuildError: no compiler, or what the compiler says.
    """
    compiler = find_compiler()
    common = [*compiler, *FLAGS, *WARNINGS, *(SANITIZE if sanitize else ())]
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        for name, source, flags in _units(on_x86=_run([*compiler, "-dumpmachine"]).startswith(("x86_64", "amd64"))):
            target = str(Path(scratch, f"{name}.o"))
            commands[target] = [*common, *flags, "-c", str(SOURCES / source), "-o", target]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands.values()))
        linked = Path(scratch, LIBRARY_NAME)
        _run([*common, "-shared", *commands, "-o", str(linked), "-lpthread", "-lm"])
        return _put(linked, folder)


def find_compiler() -> list[str]:
    """The compiler as the start of a command: what $CC says, else the first of `COMPILERS` that is there.

    Raises:
        BuildError: none is there.
    """
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise BuildError(f"no C compiler was found: looked for {named[0] if named else ', '.join(COMPILERS)}")


def is_current(library: Path) -> bool:
    """Whether the library is there, and newer than every source."""
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".py")]
    return library.is_file() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def _units(*, on_x86: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """What is compiled: a name, the source, and flags of its own."""
    sets = {**(X86_FLAGS if on_x86 else {}), "portable": ()}
    kernels = [(isa, COMPILED_FOR_EACH_ISA, (f"-DE45_ISA={isa}", *flags)) for isa, flags in sets.items()]
    once = [(Path(source).stem, source, ("-DE45_HAVE_X86=1",) if on_x86 else ()) for source in COMPILED_ONCE]
    return [*kernels, *once]


def _run(command: list[str]) -> str:
    """Run the compiler and return what it prints; its warnings go to standard error."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None
    if result.returncode != 0:
        said = result.stderr.strip() or f"exit status {result.returncode}"
        raise BuildError(f"{command[0]} failed:\n{said}")
    sys.stderr.write(result.stderr)
    return result.stdout


def _put(library: Path, folder: Path) -> Path:
    """Move it into `folder` in one step: processes that have the old one loaded go on with that."""
    folder.mkdir(parents=True, exist_ok=True)
    # Copied first, because a move from another file system is not one step.
    copy = shutil.copy2(library, folder / f".{LIBRARY_NAME}-{os.getpid()}")
    return Path(copy).replace(folder / LIBRARY_NAME)


def main() -> int:
    """Run the command line; returns the exit status, 1 where nothing could be built."""
    parser = argparse.ArgumentParser(description="Compile the native kernels.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to put the library (default: the package)")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="with the address sanitizer: start Python with LD_PRELOAD=$(gcc -print-file-name=libasan.so)",
    )
    options = parser.parse_args()
    if options.sanitize and options.out is None:
        parser.error("argument --sanitize: needs argument --out, because such a library serves no other program")
    folder: Path = options.out or PACKAGE
    if not options.sanitize and is_current(folder / LIBRARY_NAME):
        return 0
    try:
        print(build(folder, sanitize=options.sanitize))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
