"""What a user gets from the wheel: its files, a light import, and types that hold."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).parent / "consumer" / "consumer.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=REPO_ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that holds the wheel and none of its dependencies."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(wheel))
    return python


@pytest.mark.parametrize(
    "name", ["py.typed", "assets/tiny/tiny-dense/model.safetensors", "assets/tiny/tiny-moe/model.safetensors"]
)
def test_wheel_contains(wheel: Path, name: str) -> None:
    assert f"ernie45/{name}" in zipfile.ZipFile(wheel).namelist()


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    source = REPO_ROOT / "src"
    files = {path for path in (source / "ernie45").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {path.relative_to(source).as_posix() for path in files}


def test_wheel_imports_without_its_dependencies(clean_python: str, tmp_path: Path) -> None:
    output = _run(clean_python, "-c", "import ernie45; print(ernie45.__version__)", cwd=tmp_path)
    assert output.strip() == "0.1.0"


def test_a_typed_program_passes_mypy_against_the_wheel(clean_python: str, tmp_path: Path) -> None:
    program = tmp_path / "consumer.py"
    program.write_text(CONSUMER.read_text(encoding="utf-8"), encoding="utf-8")
    assert "Success" in _type_check(program, clean_python)


def test_a_mistyped_program_does_not_pass(clean_python: str, tmp_path: Path) -> None:
    program = tmp_path / "mistyped.py"
    program.write_text(
        "from ernie45 import ErnieModel, Prompt\n"
        "model = ErnieModel.from_pretrained(3)\n"
        "model.generate('1 + 1 =', temprature=0.5)\n"
        "number: int = Prompt(text='', token_ids=()).text\n",
        encoding="utf-8",
    )
    output = _type_check(program, clean_python)
    assert [f":{line}: error" in output for line in (1, 2, 3, 4)] == [False, True, True, True]


def _type_check(program: Path, python: str) -> str:
    options = ["--strict", "--no-incremental", "--config-file=", f"--python-executable={python}"]
    command = [sys.executable, "-m", "mypy", *options, program.name]
    # Its exit code says no more than its output: whether it found errors.
    result = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def _run(*command: str, cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
