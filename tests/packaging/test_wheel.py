"""What a user gets from the wheel: its files, a light import, and types that hold."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).parent / "consumer" / "consumer.py"
BUILT = ("libernie45.so", "libernie45.dylib", "not-built.txt")  # one of them, depending on the machine
WITHOUT_KERNELS = """
from pathlib import Path
import ernie45
from ernie45.kernels.library import why_not
print(Path(ernie45.__file__).parent)
print(why_not().splitlines()[0])
with ernie45.ErnieModel.from_pretrained("ernie45/tiny-dense", device="cpu", quantization="int8") as model:
    print(model.chat([{"role": "user", "content": "What is 12 + 30?"}], temperature=0).text)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that holds the wheel and none of its dependencies."""
    return _install(wheel, tmp_path_factory.mktemp("clean") / "venv")


@pytest.mark.parametrize(
    "name", ["py.typed", "assets/tiny/tiny-dense/model.safetensors", "assets/tiny/tiny-moe/model.safetensors"]
)
def test_wheel_contains(wheel: Path, name: str) -> None:
    assert f"ernie45/{name}" in zipfile.ZipFile(wheel).namelist()


def test_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    source = REPO_ROOT / "src"
    files = {path for path in (source / "ernie45").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    (in_wheel,) = packed & {f"ernie45/kernels/{name}" for name in BUILT}
    assert packed - {in_wheel} == {path.relative_to(source).as_posix() for path in files if path.name not in BUILT}


def test_wheel_imports_without_its_dependencies(clean_python: str, tmp_path: Path) -> None:
    output = _run(clean_python, "-c", "import ernie45; print(ernie45.__version__)", cwd=tmp_path)
    assert output.strip() == "0.1.0"


def test_without_a_compiler_a_model_answers(tmp_path: Path) -> None:
    wheel = _build_wheel(tmp_path, CC="/bin/false")
    assert wheel.name.endswith("-none-any.whl")
    python = _install(wheel, tmp_path / "venv")
    (site_packages,) = (tmp_path / "venv").glob("**/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    output = _run(python, "-I", "-c", WITHOUT_KERNELS)
    assert output == f"{site_packages / 'ernie45'}\nno library was built: /bin/false failed:\n12 + 30 = 42\n"


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


def _build_wheel(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    _run(*command, cwd=REPO_ROOT, **environment)
    (path,) = folder.glob("*.whl")
    return path


def _install(wheel: Path, folder: Path) -> str:
    """Make an environment that holds the wheel alone, in `folder`, and return its Python."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", str(wheel))
    return python


def _type_check(program: Path, python: str) -> str:
    options = ["--strict", "--no-incremental", "--config-file=", f"--python-executable={python}"]
    command = [sys.executable, "-m", "mypy", *options, program.name]
    # Its exit code says no more than its output: whether it found errors.
    result = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def _run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    environment = {**os.environ, **environment}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
