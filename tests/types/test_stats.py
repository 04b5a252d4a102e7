from __future__ import annotations

import time

import pytest

from ernie45 import ErnieModel, UnsupportedError
from ernie45.testing import scripted_model
from ernie45.types.stats import ModelStats, StageClock


def test_stages_are_measured_one_by_one_and_add_up() -> None:
    clock = StageClock()
    with clock.stage("find"):
        time.sleep(0.02)
    with pytest.raises(KeyError), clock.stage("check"):
        raise KeyError
    with clock.stage("find"):
        time.sleep(0.02)
    assert list(clock.seconds) == ["find", "check"]
    assert clock.seconds["find"] >= 0.04 > clock.seconds["check"]
    stats = ModelStats(load_stages={"check": 0.5, "weights": 2.0}, read_bytes=3_000_000_000)
    assert stats.load_seconds == 2.5
    assert str(stats) == "loaded in 2.50 s (check 0.50, weights 2.00; weights at 1.50 GB/s)"


def test_a_loaded_model_has_them_and_a_scripted_one_says_why_not() -> None:
    with ErnieModel.from_pretrained("ernie45/tiny-dense", device="cpu", progress=False) as model:
        assert list(model.stats.load_stages) == ["find", "check", "tokenizer", "weights", "engine"]
        assert model.stats.read_bytes > 5_000_000
        assert 0 < model.stats.load_stages["weights"] < model.stats.load_seconds == model.load_report.load_seconds
    with scripted_model(["Hi"]) as model, pytest.raises(UnsupportedError, match="not loaded"):
        _ = model.stats
