"""Plans of models whose routed experts stream, with what is measured for them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.catalogue import built_in_folder, find
from ernie45.errors import InvalidRequestError
from ernie45.experts.trace import RoutingLog, RoutingTrace
from ernie45.memory.machine import HostMemory
from ernie45.memory.planner import with_speed
from ernie45.memory.streaming import NOMINAL_DISK_RATE
from ernie45.planning import measured
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from tests.test_planning import GIB, plan


def on_a_machine_of(total_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = HostMemory(total_bytes=total_bytes, available_bytes=GIB, limited_by="machine", limit_bytes=None)
    monkeypatch.setattr("ernie45.planning.host_bytes", lambda: machine)


def test_a_name_that_streams_is_given_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine_of(64 * GIB, monkeypatch)
    made = plan("ERNIE-4.5-21B-A3B-PT", quantization="int4", memory="6GiB")
    assert made.disk_read_rate == NOMINAL_DISK_RATE
    assert made.notes[-1] == "The disk was not measured, but taken for one that reads 1.5 GB/s."
    assert made.expert_read_bytes is not None
    assert made.memory_read_rate is not None
    timed = with_speed(made, lambda: made.memory_read_rate or 0, lambda: NOMINAL_DISK_RATE)
    assert made.tokens_per_second == timed.tokens_per_second
    on_a_machine_of(5 * GIB, monkeypatch)
    elsewhere = plan("ERNIE-4.5-21B-A3B-PT", quantization="int4", memory="6GiB")
    assert (elsewhere.tokens_per_second, elsewhere.disk_read_rate) == (None, None)
    assert elsewhere.expert_read_bytes == made.expert_read_bytes


def test_the_disk_of_a_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_moe = find("tiny-moe")
    assert tiny_moe is not None
    save_checkpoint(built_in_folder(tiny_moe), tmp_path / "packed", PRESETS["int4"], progress=False)
    monkeypatch.setattr("ernie45.memory.sizing.RUNTIME_BYTES", 0)
    monkeypatch.setattr("ernie45.memory.sizing.loading_bytes", lambda *shape, **more: 0)
    monkeypatch.setattr("ernie45.memory.sizing.workspace_bytes", lambda *shape, **more: 0)
    monkeypatch.setattr("ernie45.memory.sizing.reading_bytes", lambda *shape, **more: 0)
    monkeypatch.setattr("ernie45.memory.streaming._IMPORT_BYTES", 0)
    plain = plan(tmp_path / "packed", context_tokens=256, max_batch=1, memory="1GiB")
    made = plan(tmp_path / "packed", context_tokens=256, max_batch=1, memory=str(int(plain.peak_bytes * 0.9)))
    assert (made.verdict, made.preset, made.notes) == ("streams", "int4", ())
    assert made.disk_read_rate is not None
    assert made.disk_read_rate not in (0, NOMINAL_DISK_RATE)
    assert made.tokens_per_second is not None
    assert made.expert_slots is not None
    assert 2 * 2 <= made.expert_slots.text < 3 * 8
    assert measured(replace(made, tokens_per_second=None), tmp_path / "packed") == made, "measured once"


def recorded(num_steps: int, *, num_layers: int = 27, step_tokens: int = 1) -> RoutingTrace:
    """Of a model with 64 experts, of which every token chooses the first 6."""
    log = RoutingLog(64)
    with log.recording() as recording:
        for _ in range(num_steps):
            with log.step():
                for layer in range(1, num_layers + 1):
                    log.record(layer, np.tile(np.arange(6), (step_tokens, 1)))
    return recording.trace


def test_a_trace_says_what_a_token_reads() -> None:
    asked: dict[str, Any] = {"quantization": "int4", "memory": "6GiB", "context_tokens": 8192}
    uniform = plan("ERNIE-4.5-21B-A3B-PT", **asked)
    made = plan("ERNIE-4.5-21B-A3B-PT", routing=recorded(10), **asked)
    assert (made.expert_hit_rate, made.routing_tokens) == (0.9, 10), "all but the first token's"
    assert made.expert_read_bytes == pytest.approx(0.1 * 27 * 6 * 2 * 3 * 2560 * 1536)
    assert made.tokens_per_second is not None
    assert uniform.tokens_per_second is not None
    assert made.tokens_per_second > 2 * uniform.tokens_per_second


def test_a_trace_that_cannot_be_followed() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"6 of 64 experts chosen in 3 layers, where .*-PT chooses 6 of 64 in 27"
    ):
        plan("ERNIE-4.5-21B-A3B-PT", routing=recorded(1, num_layers=3))
    with pytest.raises(InvalidRequestError, match="must be a RoutingTrace, not str"):
        plan("ERNIE-4.5-21B-A3B-PT", routing="trace.npz")
    with pytest.raises(InvalidRequestError, match="no step of text tokens that decodes"):
        plan("ERNIE-4.5-21B-A3B-PT", quantization="int4", memory="6GiB", routing=recorded(1, step_tokens=17))


def test_auto_streams_the_smallest_preset_where_none_fits() -> None:
    made = plan("ERNIE-4.5-21B-A3B-PT", memory="6GiB")
    assert (made.preset, made.verdict) == ("int4", "streams")


def test_planning_by_name_is_quick() -> None:
    plan("ERNIE-4.5-300B-A47B-PT")  # the bandwidth is measured once
    started = time.process_time()
    made = plan("ERNIE-4.5-300B-A47B-PT", quantization="int4")
    assert time.process_time() - started < 0.5
    assert made.verdict == "streams"
