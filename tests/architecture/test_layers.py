"""The layers of docs/architecture.md, as import-linter contracts in pyproject.toml."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
CONTRACTS = REPO_ROOT / "pyproject.toml"
SUMMARY = re.compile(r"Contracts: \d+ kept, (\d+) broken")


def test_imports_keep_to_the_layers() -> None:
    output = _check_imports(REPO_ROOT / "src")
    assert _count_broken_contracts(output) == 0, output


@pytest.mark.parametrize(
    ("file", "line"),
    [
        pytest.param("errors.py", "import ernie45.types", id="upwards"),
        pytest.param("sampling/__init__.py", "import ernie45.tokenizer", id="sibling"),
        pytest.param("catalogue.py", "import torch", id="torch in what describes"),
        pytest.param("engine/__init__.py", "import transformers", id="transformers in the hot path"),
    ],
)
def test_an_import_against_a_contract_is_found(tmp_path: Path, file: str, line: str) -> None:
    _copy_python_files(REPO_ROOT / "src", tmp_path)
    with (tmp_path / "ernie45" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    output = _check_imports(tmp_path)
    assert _count_broken_contracts(output) == 1, output


def test_a_module_without_a_layer_is_found(tmp_path: Path) -> None:
    _copy_python_files(REPO_ROOT / "src", tmp_path)
    (tmp_path / "ernie45" / "stray.py").touch()
    output = _check_imports(tmp_path)
    assert _count_broken_contracts(output) == 1, output
    assert "stray" in output


def _check_imports(source: Path) -> str:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-cache", "--config", str(CONTRACTS)]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    # Its exit code is 1 for a broken contract and for an unreadable one; the output tells them apart.
    result = subprocess.run(command, env=environment, cwd=source, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def _count_broken_contracts(output: str) -> int:
    summary = SUMMARY.search(output)
    assert summary is not None, output
    return int(summary[1])


def _copy_python_files(source: Path, target: Path) -> None:
    for path in source.rglob("*.py"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
