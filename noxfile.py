"""Every check of this project: `nox -s NAME` runs one, plain `nox` runs those marked with a star."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import nox
import nox.project

nox.needs_version = ">=2025.5.1"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "tests"]

TORCH = "torch==2.13.0"
OTHER_PYTHONS = ("3.10", "3.12", "3.13")
PYPROJECT = nox.project.load_toml("pyproject.toml")
# nox gives every session an environment of its own; those that need torch (700 MB) share this one.
TORCH_VENV = Path(".nox/torch").resolve()


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run the tests; what follows `--` goes to pytest."""
    python = prepare_torch_venv(session, "test")
    session.run(python, "-m", "pytest", *session.posargs)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Ask the built-in tiny models a few questions; needs no network after the first run."""
    python = prepare_torch_venv(session)
    session.run(python, "examples/quickstart.py", *session.posargs)
    session.run(python, "examples/thinking.py")
    session.run(python, "examples/pictures.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and the layers of the architecture."""
    install_once(session, "python", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Type-check everything, and the package for the other Python versions."""
    python = prepare_torch_venv(session, "test")
    session.run(python, "-m", "mypy")
    for version in OTHER_PYTHONS:
        session.run(python, "-m", "mypy", f"--python-version={version}", "src")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error."""
    install_once(session, "python", *group("docs"))
    session.run("zensical", "build", "--strict", "--clean")


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the quick tests on the oldest versions allowed (downloads several GB)."""
    oldest = [requirement.replace(">=", "==") for requirement in PYPROJECT["project"]["dependencies"]]
    install_once(session, "python", *oldest, "--editable", ".", *group("test"))
    compile_kernels(session, "python")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Compare speed with other engines; what follows `--` goes to benchmarks.peers."""
    python = prepare_torch_venv(session)
    session.run(python, "-m", "benchmarks.peers", *session.posargs)


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


def prepare_torch_venv(session: nox.Session, *groups: str) -> str:
    """Python of the shared environment, with torch, the package (editable) and the groups installed."""
    python = TORCH_VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(TORCH_VENV))
    # First and pinned: a range left to pip takes the newest build, several GB of CUDA on Linux.
    install_once(session, str(python), TORCH)
    install_once(session, str(python), "--editable", ".", *(name for each in groups for name in group(each)))
    compile_kernels(session, str(python))
    return str(python)


def compile_kernels(session: nox.Session, python: str) -> None:
    """Compile what has changed in csrc/ since the package was installed; without a compiler, go on."""
    session.run(python, "csrc/build.py", success_codes=[0, 1])


def install_once(session: nox.Session, python: str, *arguments: str) -> None:
    """`pip install` for `python`, skipped if it had the same before: a second run needs no network."""
    prefix = session.run(python, "-c", "import sys; print(sys.prefix)", silent=True, log=False)
    asked = "\n".join([Path("pyproject.toml").read_text(encoding="utf-8"), *arguments])
    stamp = Path(str(prefix).strip()) / f"installed-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    if not stamp.exists():
        session.run(python, "-m", "pip", "install", "--quiet", *arguments)
        stamp.touch()
