"""csrc/build.py and the build hook, on a project of the same layout with a few lines of C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ernie45.kernels.library import FUNCTIONS, LIBRARY_FILE, VERSION, open_library

REPO_ROOT = Path(__file__).resolve().parents[2]
OF_THE_PROJECT = (
    *["pyproject.toml", ".gitignore", "README.md", "LICENSE", "CHANGELOG.md", "hatch_build.py", "csrc/build.py"],
    *["src/ernie45/__init__.py", "src/ernie45/kernels/__init__.py"],
)
SOURCES = {
    "kernels.c": "#define JOIN(a, b) a##b\n#define NAME(isa) JOIN(sum_, isa)\nint NAME(E45_ISA)(void) { return 1; }\n",
    "pool.c": "int pool(void) { return 2; }\n",
    "api.c": '#define API __attribute__((visibility("default")))\n'
    + "".join(f"API int e45_{name}(void) {{ return {VERSION}; }}\n" for name in FUNCTIONS),
}
NO_COMPILER = {"CC": shutil.which("false") or "/bin/false"}
LIBRARY = f"ernie45/kernels/{LIBRARY_FILE.name}"
REASON = "ernie45/kernels/not-built.txt"

has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C compiler on this machine")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name in OF_THE_PROJECT:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO_ROOT / name, root / name)
    for name, text in SOURCES.items():
        (root / "csrc" / name).write_text(text, encoding="utf-8")
    return root


@needs_compiler
def test_a_wheel_with_kernels_is_for_one_platform_and_every_python(project: Path) -> None:
    wheel = _pack(project, "wheel")
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    assert LIBRARY in _names(wheel)
    assert REASON not in _names(wheel)
    assert "Root-Is-Purelib: false" in _metadata(wheel, "WHEEL")
    zipfile.ZipFile(wheel).extract(LIBRARY, project)
    assert not isinstance(open_library(project / LIBRARY), str)


@needs_compiler
def test_without_a_working_compiler_the_wheel_says_why_it_has_none(project: Path) -> None:
    _pack(project, "wheel:editable")  # what lies beside the sources does not get into a wheel
    wheel = _pack(project, "wheel", env=NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in _names(wheel)
    assert "false failed:\nexit status 1" in zipfile.ZipFile(wheel).read(REASON).decode()


@needs_compiler
def test_what_the_compiler_says_is_kept(project: Path) -> None:
    (project / "csrc" / "pool.c").write_text("int pool(void) { return nothing; }\n" * 20, encoding="utf-8")
    reason = zipfile.ZipFile(_pack(project, "wheel")).read(REASON).decode()
    assert "pool.c:1:" in reason
    assert len(reason.splitlines()) == 10


@needs_compiler
def test_an_editable_install_has_the_library_beside_its_sources(project: Path) -> None:
    library = project / "src" / LIBRARY
    _pack(project, "wheel:editable")
    built = library.stat()
    _pack(project, "wheel:editable")
    assert library.stat().st_mtime_ns == built.st_mtime_ns  # no source is newer
    _touch(project / "csrc" / "pool.c", built.st_mtime + 10)
    _pack(project, "wheel:editable")
    assert library.stat().st_ino != built.st_ino


@needs_compiler
def test_an_outdated_library_does_not_stay(project: Path) -> None:
    library = project / "src" / LIBRARY
    _pack(project, "wheel:editable")
    _touch(project / "csrc" / "kernels.c", library.stat().st_mtime + 10)
    _pack(project, "wheel:editable", env=NO_COMPILER)
    assert not library.exists()
    assert "false failed" in (project / "src" / REASON).read_text(encoding="utf-8")


def test_the_sdist_builds_the_same(project: Path, tmp_path: Path) -> None:
    (project / "src" / LIBRARY).write_bytes(b"of this machine")
    sdist = _pack(project, "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {"hatch_build.py", "csrc/build.py", *(f"csrc/{name}" for name in SOURCES)} <= names
    assert f"src/{LIBRARY}" not in names
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert (LIBRARY if has_compiler else REASON) in _names(_pack(unpacked, "wheel"))


def test_no_compiler_is_said_in_words(project: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for env, looked_for in [({"CC": ""}, "cc, gcc, clang"), ({"CC": "no-such-cc -O1"}, "no-such-cc")]:
        result = _build(project, env={**env, "PATH": str(empty)})
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"no C compiler was found: looked for {looked_for}\n"


@needs_compiler
def test_a_developer_builds_into_any_folder(project: Path, tmp_path: Path) -> None:
    built = tmp_path / "out" / LIBRARY_FILE.name
    assert _build(project, "--out", str(built.parent)).stdout == f"{built}\n"
    assert _build(project, "--out", str(built.parent)).stdout == ""  # it is current
    assert [path.name for path in built.parent.iterdir()] == [built.name]


@needs_compiler
def test_a_build_with_the_sanitizer_takes_a_folder_of_its_own(project: Path, tmp_path: Path) -> None:
    assert "--sanitize: needs argument --out" in _build(project, "--sanitize").stderr
    result = _build(project, "--sanitize", "--out", str(tmp_path / "out"))
    if "asan" in result.stderr:
        pytest.skip("the compiler comes without the address sanitizer")
    assert b"__asan_init" in (tmp_path / "out" / LIBRARY_FILE.name).read_bytes()


@needs_compiler
@pytest.mark.slow
def test_our_own_sources_compile_without_a_warning(tmp_path: Path) -> None:
    result = _build(REPO_ROOT, "--out", str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    assert not isinstance(open_library(tmp_path / LIBRARY_FILE.name), str)


def _build(root: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "csrc" / "build.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)


def _pack(root: Path, target: str, env: dict[str, str] | None = None) -> Path:
    """The wheel or sdist, packed as pip has it done."""
    folder = root / "dist" / f"{len(list(root.glob('dist/*')))}"
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    environment = {**os.environ, **(env or {})}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.iterdir()
    return path


def _names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def _metadata(wheel: Path, file: str) -> str:
    (name,) = (name for name in _names(wheel) if name.endswith(f".dist-info/{file}"))
    return zipfile.ZipFile(wheel).read(name).decode()


def _touch(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))
