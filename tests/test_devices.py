from __future__ import annotations

import threading

import pytest
import torch.nn.functional as F

from ernie45.devices import product_rate


def test_the_rate_is_measured_once_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    rate = product_rate("cpu", "float32", in_features=30, out_features=50)
    assert 1e6 < rate < 1e15
    assert threading.active_count() == before
    monkeypatch.setattr(F, "linear", None)
    assert product_rate("cpu", "float32", in_features=30, out_features=50) == rate
