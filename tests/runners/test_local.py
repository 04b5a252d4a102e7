from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ernie45.backends.base import Backend, BuildOptions
from ernie45.backends.text import build_text
from ernie45.checkpoint.headers import read_headers, read_json
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.read import TensorReader
from ernie45.errors import ModelClosedError
from ernie45.runners.base import Handle, Runner
from ernie45.runners.local import LocalRunner
from ernie45.spec import parse_spec
from ernie45.types.placement import Placement
from ernie45.types.requests import Sampling, TokenRequest
from ernie45.types.results import TokenEvent


@pytest.fixture
def runner(small_folder_path: Path) -> Iterator[Runner]:
    """Two slots of 64 tokens on the small model."""
    runner = LocalRunner(build(small_folder_path), num_slots=2, context_tokens=64, num_token_ids=300)
    yield runner
    runner.close()


def build(folder: Path, placement: Placement | None = None) -> Backend:
    spec = parse_spec(read_json(folder / "config.json"))
    source = TensorReader(read_headers(folder), PtLayout())
    options = BuildOptions.unquantised(spec, dtype=torch.float32, device="cpu", context_tokens=64)
    return build_text(spec, source, options if placement is None else replace(options, placement=placement))


def request(*ids: int, max_new_tokens: int = 8) -> TokenRequest:
    return TokenRequest(token_ids=ids, sampling=Sampling(temperature=0.0), max_new_tokens=max_new_tokens)


def next_event(handle: Handle) -> TokenEvent:
    while (event := handle.poll()) is None:
        ready = threading.Event()
        handle.notify(ready.set)
        assert ready.wait(timeout=20)
    return event


def read(handle: Handle) -> tuple[list[int], str]:
    ids: list[int] = []
    while True:
        event = next_event(handle)
        if event.token_id is not None:
            ids.append(event.token_id)
        if event.finish_reason is not None:
            return ids, event.finish_reason


def test_requests_give_tokens_and_an_end(runner: Runner) -> None:
    ids, reason = read(runner.submit(request(5, 6, max_new_tokens=7)))
    assert (len(ids), reason) == (7, "length")
    assert max(ids) < 300


def test_submit_returns_at_once_and_more_requests_than_slots_wait(runner: Runner) -> None:
    handles = [runner.submit(request(5, n)) for n in range(6)]
    together = [read(handle) for handle in handles]
    assert together == [read(runner.submit(request(5, n))) for n in range(6)]


def test_a_scoring_request_gives_logits_and_no_tokens(runner: Runner) -> None:
    given: list[torch.Tensor] = []
    asked = TokenRequest(token_ids=(5, 6, 7), logit_positions=(0, 2), on_logits=given.append)
    event = next_event(runner.submit(asked))
    assert (event.token_id, event.finish_reason) == (None, "stop")
    assert [logits.shape for logits in given] == [(2, 384)]


def test_a_cancelled_request_ends_and_others_go_on(runner: Runner) -> None:
    expected = read(runner.submit(request(9, max_new_tokens=20)))
    cancelled, other = runner.submit(request(5, max_new_tokens=60)), runner.submit(request(9, max_new_tokens=20))
    next_event(cancelled)
    cancelled.cancel()
    cancelled.cancel()
    assert read(cancelled)[1] == "cancelled"
    assert read(other) == expected


@pytest.mark.parametrize("when", ["running", "waiting", "after"])
def test_close_ends_every_request_with_an_error(runner: Runner, when: str) -> None:
    handles = [runner.submit(request(5, max_new_tokens=63)) for _ in range(3)]  # the third has no slot
    next_event(handles[0])
    runner.close()
    runner.close()
    calls: dict[str, Callable[[], object]] = {
        "running": lambda: read(handles[0]),
        "waiting": lambda: read(handles[2]),
        "after": lambda: runner.submit(request(5)),
    }
    with pytest.raises(ModelClosedError, match="closed"):
        calls[when]()


def test_a_model_on_two_devices_with_its_cache_in_int8(runner: Runner, small_folder_path: Path) -> None:
    placement = replace(Placement.on("cpu:0", 2), layers=("cpu:0", "cpu:1"), head="cpu:1")
    split = LocalRunner(
        build(small_folder_path, placement),
        num_slots=1,
        context_tokens=64,
        num_token_ids=300,
        kv_dtype="int8",
        placement=placement,
    )
    logits: list[torch.Tensor] = []
    asked = TokenRequest(token_ids=(5, 6, 7), logit_positions=(2,), on_logits=logits.append)
    for on in (split, runner):
        next_event(on.submit(asked))
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < error < 0.05
    assert len(read(split.submit(request(5, 6, max_new_tokens=7)))[0]) == 7
    split.close()
