"""The kernels' threads and memory in a process: many callers, forks, sleep; and all of it under the address
sanitizer."""

from __future__ import annotations

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernie45.kernels.library import native_library, set_threads
from ernie45.kernels.native import Kernels
from tests.kernels.panel_matrices import Matrix, Mlp, Norm, random

REPO_ROOT = Path(__file__).resolve().parents[2]


def test_callers_on_many_threads(native: Kernels) -> None:
    set_threads(3)
    matrix, mlp, norm = Matrix.draw("int4", 130, 320), Mlp.draw(("int8", "none"), 320, 192), Norm(320)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        native.mlp(norm.struct, mlp.struct, y)
        return native.linear(matrix.linear.struct, x), y

    inputs = [random(1 + 19 * i, 320, seed=i) for i in range(6)]
    expected = [both(x) for x in inputs]
    with ThreadPoolExecutor(6) as callers:
        for _ in range(20):
            for found, right in zip(callers.map(both, inputs), expected, strict=True):
                assert all(map(torch.equal, found, right))


def test_memory_and_threads_are_given_back_and_taken_again(native: Kernels) -> None:
    library = native_library()
    assert library is not None
    library.e45_workspace_bytes.restype = ctypes.c_int64
    set_threads(3)
    matrix, x = Matrix.draw("int8", 130, 320), random(50, 320)
    expected = native.linear(matrix.linear.struct, x)
    for _ in range(20):
        assert library.e45_workspace_bytes() >= 50 * 320
        library.e45_trim()
        assert library.e45_workspace_bytes() == 0
        assert torch.equal(native.linear(matrix.linear.struct, x), expected)


def test_idle_threads_sleep(native: Kernels) -> None:
    set_threads(3)
    matrix, x = Matrix.draw("int8", 130, 320), random(50, 320)
    native.linear(matrix.linear.struct, x)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.02


FORKING = """
import os, sys, threading
import torch
from ernie45.kernels.library import set_threads
from ernie45.kernels.native import kernels
from tests.kernels.panel_matrices import Matrix, random

native, matrix, x = kernels(), Matrix.draw("int4", 640, 320), random(50, 320)
set_threads(3)
expected = native.linear(matrix.linear.struct, x)
under_way = True

def keep_calling():
    while under_way:
        native.linear(matrix.linear.struct, x)

caller = threading.Thread(target=keep_calling)
caller.start()  # forks find a call under way
for _ in range(20):
    child = os.fork()
    if child == 0:
        same = [torch.equal(native.linear(matrix.linear.struct, x), expected) for _ in range(5)]
        os._exit(0 if all(same) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(native.linear(matrix.linear.struct, x), expected)
under_way = False
caller.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.usefixtures("native")
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = run_python("-c", FORKING, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="the address sanitizer is preloaded as on Linux")
@pytest.mark.usefixtures("native")
def test_calls_at_odd_sizes_under_the_address_sanitizer(tmp_path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc"))), None)
    if compiler is None:
        pytest.skip("no gcc on this machine")
    found = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler} has no libasan.so")
    build = runpy.run_path(str(REPO_ROOT / "csrc" / "build.py"))
    library = build["build"](tmp_path, sanitize=True)
    # Torch's own leaks are none of ours.
    told = {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    program = ("-m", "tests.kernels.sanitized_calls", str(library))
    done = run_python(*program, timeout=600, **told)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "heap-buffer-overflow" in run_python(*program, "beyond", timeout=600, **told).stderr


def run_python(*arguments: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
