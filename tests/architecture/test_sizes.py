"""Files fit on a few screens, functions on one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "ernie45"
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 75

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_file_and_its_functions_are_short(file: str) -> None:
    source = (PACKAGE / file).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    long_functions = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long_functions == {}
