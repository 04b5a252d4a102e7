"""`import ernie45` is cheap: command lines, notebooks and type stubs pay for it on every start."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, cast

import pytest

HEAVY = ("torch", "transformers", "jinja2", "sentencepiece", "huggingface_hub", "numpy", "PIL")
MAX_IMPORT_SECONDS = 0.15
TRIES = 5

PROBE = """
import json, sys, time
start = time.perf_counter()
import ernie45
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_import_loads_nothing_heavy() -> None:
    assert [name for name in HEAVY if name in _import_in_new_process("")["modules"]] == []


@pytest.mark.parametrize(
    "module",
    ["errors", "types.results", "spec", "catalogue", "checkpoint.headers", "presets", "memory.planner", "planning"],
)
def test_what_plans_and_describes_loads_no_torch(module: str) -> None:
    loaded = _import_in_new_process(f"import ernie45.{module}")["modules"]
    assert [name for name in ("torch", "transformers") if name in loaded] == []


def test_import_is_quick() -> None:
    seconds = min(_import_in_new_process("")["seconds"] for _ in range(TRIES))
    assert seconds < MAX_IMPORT_SECONDS


def _import_in_new_process(then: str) -> dict[str, Any]:
    program = PROBE.replace("seconds = ", f"{then}\nseconds = ")
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return cast("dict[str, Any]", json.loads(result.stdout))
