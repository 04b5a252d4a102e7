from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import InvalidRequestError, UnsupportedError
from ernie45.kernels import library
from ernie45.kernels.library import (
    instruction_set,
    instruction_sets,
    native_library,
    open_library,
    set_threads,
    use_instruction_set,
    why_not,
)
from ernie45.kernels.native import _SIGNATURES

REPO_ROOT = Path(__file__).resolve().parents[2]
BUILD: dict[str, Any] = runpy.run_path(str(REPO_ROOT / "csrc" / "build.py"))


def _compiler() -> list[str] | None:
    try:
        command: list[str] = BUILD["find_compiler"]()
    except BUILD["BuildError"]:
        return None
    return command


needs_compiler = pytest.mark.skipif(_compiler() is None, reason="no C compiler on this machine")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", lambda: "no library was built: gcc had the day off")


@pytest.fixture
def chosen_set() -> Iterator[None]:
    """Puts the instruction set in use back."""
    before = instruction_set()
    yield
    if before is not None:
        use_instruction_set(before)


@needs_compiler
def test_where_a_compiler_is_there_are_kernels() -> None:
    assert why_not() is None, "python csrc/build.py compiles them"
    assert native_library() is native_library() is not None
    assert instruction_sets()[-1] == "portable"
    assert instruction_set() in instruction_sets()


@needs_compiler
@pytest.mark.usefixtures("chosen_set")
def test_every_set_of_this_machine_can_be_used() -> None:
    for name in instruction_sets():
        use_instruction_set(name)
        assert instruction_set() == name
    with pytest.raises(UnsupportedError, match="'sse9' is not available") as caught:
        use_instruction_set("sse9")
    assert caught.value.hint.startswith("use '")
    assert instruction_set() == instruction_sets()[-1]


@needs_compiler
def test_threads_are_at_least_one() -> None:
    with pytest.raises(InvalidRequestError, match="do not run on 0 threads"):
        set_threads(0)


@pytest.mark.usefixtures("no_library")
def test_without_a_library() -> None:
    assert native_library() is None
    assert why_not() == "no library was built: gcc had the day off"
    assert instruction_set() is None
    assert instruction_sets() == ()
    set_threads(2)
    with pytest.raises(UnsupportedError, match="'avx2' is not available") as caught:
        use_instruction_set("avx2")
    assert "ernie45 doctor" in caught.value.hint


def test_a_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "REASON_FILE", tmp_path / "not-built.txt")
    assert open_library(tmp_path / "libernie45.so") == "no library was built"
    (tmp_path / "not-built.txt").write_text("no C compiler was found\n", encoding="utf-8")
    assert open_library(tmp_path / "libernie45.so") == "no library was built: no C compiler was found"


def test_a_damaged_library(tmp_path: Path) -> None:
    damaged = tmp_path / "libernie45.so"
    damaged.write_bytes(b"\x7fELF and no more")
    assert str(open_library(damaged)).startswith("libernie45.so could not be loaded: ")


@needs_compiler
@pytest.mark.parametrize(
    ("version", "left_out", "reason"),
    [
        (999, "", "has version 999 of the interface, and this ernie45 needs "),
        (library.VERSION, "e45_head", "was built from other sources: .*e45_head"),
        (library.VERSION, "e45_version", "was built from other sources: .*e45_version"),
    ],
)
def test_a_library_of_other_sources(tmp_path: Path, version: int, left_out: str, reason: str) -> None:
    names = {f"e45_{name}" for name in library.FUNCTIONS} - {left_out}
    source = "\n".join(f"int {name}(void) {{ return {version}; }}" for name in names)
    (tmp_path / "other.c").write_text(source, encoding="utf-8")
    built = tmp_path / "libernie45.so"
    compiler = _compiler()
    assert compiler is not None
    subprocess.run([*compiler, "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(built)], check=True)
    assert re.match(f"libernie45.so {reason}", str(open_library(built)))


def test_the_version_is_that_of_the_header() -> None:
    header = (REPO_ROOT / "csrc" / "ernie45.h").read_text(encoding="utf-8")
    assert re.findall(r"#define E45_VERSION (\d+)", header) == [str(library.VERSION)]


def test_the_functions_are_those_of_the_header_and_all_that_is_called() -> None:
    header = (REPO_ROOT / "csrc" / "ernie45.h").read_text(encoding="utf-8")
    assert set(re.findall(r"^E45_API .*?\be45_(\w+)\(", header, re.MULTILINE)) == set(library.FUNCTIONS)
    assert _SIGNATURES.keys() <= set(library.FUNCTIONS)


def test_the_build_puts_it_where_it_is_looked_for() -> None:
    assert BUILD["PACKAGE"] / BUILD["LIBRARY_NAME"] == library.LIBRARY_FILE


def test_loading_it_needs_no_torch() -> None:
    program = "import sys; from ernie45.kernels.library import why_not; why_not(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
