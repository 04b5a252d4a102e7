"""What a model's routers choose, as `trace_routing` records it on all paths."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ernie45 import ErnieModel, InvalidRequestError, UnsupportedError
from ernie45.kernels.ops import route
from ernie45.testing import scripted_model
from tests.backends.native_models import SHAPES, build, prefill, random_ids
from tests.streamed_models import open_model

MOE, VL = "ernie45/tiny-moe", "ernie45/tiny-vl"
IDS = random_ids(45)


@pytest.mark.usefixtures("without_library")
def test_a_trace_is_what_the_routers_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Tensor] = []

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        numbers, shares = route(*arguments)
        chosen.append(numbers)
        return numbers, shares

    with open_model(MOE, None, quantization="none") as model, model.trace_routing() as recording:
        monkeypatch.setattr("ernie45.backends.decoder.route", watched)
        model.generate(IDS, temperature=0, max_new_tokens=5, ignore_eos=True)
        trace = recording.trace
    assert trace.layers == (1, 2, 3)
    assert trace.num_tokens() == 45 + 4
    assert np.array_equal(trace.chosen, torch.cat(chosen).numpy())
    assert trace.calls[:, 0].tolist() == [1, 2, 3] * 5
    assert trace.counts().sum(axis=1).tolist() == [49 * 2] * 3


@pytest.mark.usefixtures("native")
def test_native_kernels_record_what_torchs_layers_would(request: pytest.FixtureRequest) -> None:
    traces = []
    for fixture in ("native", "without_library"):
        request.getfixturevalue(fixture)
        model = build(SHAPES["experts"], "int8", dtype=torch.float32)
        assert model.is_native == (fixture == "native")
        routing = model.backend.routing
        assert routing is not None
        with routing.recording() as recording:
            prefill(model, IDS, (20, 44, 45))
        traces.append(recording.trace)
    native, torchs = traces
    assert np.array_equal(native.calls, torchs.calls)
    same = np.mean(np.sort(native.chosen) == np.sort(torchs.chosen))
    assert same > 0.97, "where two experts are nearly as good, a rounding decides"


@pytest.mark.parametrize("name", ["experts", "no shared expert", "one expert"])
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
@pytest.mark.usefixtures("native")
def test_recording_changes_no_bit(name: str, preset: str) -> None:
    model = build(SHAPES[name], preset)
    assert model.is_native
    expected = prefill(model, IDS, (20, 44, 45))
    routing = model.backend.routing
    assert routing is not None
    with routing.recording() as recording:
        assert torch.equal(prefill(model, IDS, (20, 44, 45), slot=1), expected)
    assert recording.trace.num_tokens() == 45


@pytest.mark.parametrize("implementation", ["native", "without_library"])
def test_pictures_are_recorded_in_their_own_bank(implementation: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(implementation)
    content = [
        {"type": "image", "image": Image.new("RGB", (112, 84), "red")},
        {"type": "text", "text": "What is this?"},
    ]
    with open_model(VL, None) as model:
        prompt = model.render([{"role": "user", "content": content}])
        with model.trace_routing() as recording:
            model.logits(prompt)
    trace = recording.trace
    assert trace.num_tokens("vision") == 12 + 2  # with the markers of start and end
    assert trace.num_tokens() == len(prompt) - 14
    assert trace.counts("vision").sum(axis=1).tolist() == [14 * trace.chosen.shape[1]] * len(trace.layers)


@pytest.mark.parametrize("implementation", ["native", "without_library"])
def test_streamed_experts_are_recorded_as_resident_ones(implementation: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(implementation)
    traces = []
    for slots in (None, 5):
        with open_model(MOE, slots, quantization="int8") as model, model.trace_routing() as recording:
            model.generate(IDS, temperature=0, max_new_tokens=5, ignore_eos=True)
        traces.append(recording.trace)
    resident, streamed = traces
    assert np.array_equal(streamed.calls, resident.calls)
    assert np.array_equal(streamed.chosen, resident.chosen)


def test_only_what_runs_in_the_block_is_recorded_by_whoever_asks() -> None:
    with open_model(MOE, None, prefix_cache=False) as model:
        expected = model.logits(IDS)
        with model.trace_routing() as recording:
            asking = threading.Thread(target=model.logits, args=(IDS[:30],))
            asking.start()
            asking.join()
            assert torch.equal(model.logits(IDS), expected)
            with pytest.raises(InvalidRequestError, match="recorded already"), model.trace_routing():
                pass
        assert torch.equal(model.logits(IDS), expected)
        assert recording.trace.num_tokens() == 30 + 45
        with model.trace_routing(max_tokens=40) as short:
            model.logits(IDS[:30])
            model.logits(IDS[:20])
    assert (short.trace.num_tokens(), short.trace.missed_tokens) == (30, 20)


def test_a_model_without_routed_experts_has_nothing_to_trace(small_folder_path: Path) -> None:
    with (
        ErnieModel.from_pretrained(small_folder_path, device="cpu", progress=False) as dense,
        pytest.raises(UnsupportedError, match="small has no routed experts"),
    ):
        dense.trace_routing()
    with pytest.raises(UnsupportedError, match="scripted has no routed experts"):
        scripted_model(["Hello!"]).trace_routing()
