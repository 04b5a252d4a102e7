"""Fixtures for tests of kernels."""

from __future__ import annotations

import pytest

from ernie45.kernels.library import instruction_sets, use_instruction_set
from ernie45.kernels.native import Kernels


@pytest.fixture(params=["avx512bf16", "avx512vnni", "avx2", "portable"])
def each_set(request: pytest.FixtureRequest, native: Kernels) -> Kernels:
    """The native kernels on one instruction set after the other."""
    if request.param not in instruction_sets():
        pytest.skip(f"this machine does not run {request.param}")
    use_instruction_set(request.param)
    return native
