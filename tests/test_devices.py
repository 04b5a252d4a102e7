from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from ernie45 import devices
from ernie45.devices import free_bytes, product_rate
from ernie45.memory.machine import HostMemory

MIB = 2**20


def test_the_rate_is_measured_once_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    rate = product_rate("cpu", "float32", in_features=30, out_features=50)
    assert 1e6 < rate < 1e15
    assert threading.active_count() == before
    monkeypatch.setattr(F, "linear", None)
    assert product_rate("cpu", "float32", in_features=30, out_features=50) == rate


def test_on_the_cpu_a_cgroup_limits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostMemory(total_bytes=2**35, available_bytes=44 * MIB, limited_by="cgroup", limit_bytes=64 * MIB)
    monkeypatch.setattr(devices, "host_bytes", lambda: host)
    assert free_bytes(torch.device("cpu")) == 44 * MIB


@pytest.mark.parametrize(("allocated", "free"), [(100, 900), (1000, 0), (1100, 0)])
def test_on_mps_what_is_allocated_is_not_free(monkeypatch: pytest.MonkeyPatch, allocated: int, free: int) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000 * MIB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: allocated * MIB)
    assert free_bytes(torch.device("mps")) == free * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_on_a_gpu_what_is_allocated_is_not_free() -> None:
    device = torch.device("cuda:0")
    torch.cuda.empty_cache()
    before = free_bytes(device)
    held = torch.empty(512 * MIB, dtype=torch.uint8, device=device)
    assert before - free_bytes(device) >= 500 * MIB
    del held
    torch.cuda.empty_cache()
