from __future__ import annotations

import re
import threading
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ernie45.errors import InvalidRequestError
from ernie45.experts.trace import RoutingLog, RoutingTrace


def run(log: RoutingLog, *calls: tuple[int, list[list[int]]]) -> None:
    """A step whose calls are a layer and the experts that it chose for each token."""
    with log.step():
        for layer, chosen in calls:
            log.record(layer, np.array(chosen))


def recorded(*calls: tuple[int, list[list[int]]], num_experts: int = 4) -> RoutingTrace:
    """A step for each run of layers that go up."""
    log = RoutingLog(num_experts)
    starts = [index for index, (layer, _) in enumerate(calls) if not index or layer <= calls[index - 1][0]]
    with log.recording() as recording:
        for start, end in pairwise([*starts, len(calls)]):
            run(log, *calls[start:end])
    return recording.trace


# A prompt of two tokens, then two tokens of a reply, in layers 1 and 2.
TRACE = recorded(
    (1, [[0, 1], [1, 2]]),
    (2, [[3, 2], [2, 0]]),
    (1, [[1, 3]]),
    (2, [[0, 2]]),
    (1, [[1, 0]]),
    (2, [[0, 1]]),
)


def test_a_trace_has_what_every_layer_chose_in_order() -> None:
    assert TRACE.layers == (1, 2)
    assert TRACE.num_tokens() == 4
    assert TRACE.experts(1).tolist() == [[0, 1], [1, 2], [1, 3], [1, 0]]
    assert TRACE.experts(2).tolist() == [[3, 2], [2, 0], [0, 2], [0, 1]]
    assert TRACE.counts().tolist() == [[2, 4, 1, 1], [3, 1, 3, 1]]


def test_experts_take_a_byte_or_two() -> None:
    assert TRACE.chosen.dtype == np.uint8
    wide = recorded((0, [[299, 0]]), num_experts=300)
    assert wide.chosen.dtype == np.uint16
    assert wide.experts(0).tolist() == [[299, 0]]


def test_banks_are_counted_apart() -> None:
    log = RoutingLog(4)
    with log.recording() as recording, log.step():
        log.record(1, np.array([[0], [2]]))
        log.record(1, np.array([[3]]), "vision")
    trace = recording.trace
    assert trace.counts().tolist() == [[1, 0, 1, 0]]
    assert trace.counts("vision").tolist() == [[0, 0, 0, 1]]
    assert (trace.num_tokens(), trace.num_tokens("vision")) == (2, 1)
    assert repr(trace) == "<RoutingTrace of 2 text tokens and 1 of pictures: 1 of 4 experts in 1 layers>"
    with pytest.raises(InvalidRequestError, match="no bank of experts 'audio'"):
        trace.counts("audio")  # type: ignore[arg-type]


def test_nothing_is_kept_outside_of_a_recording() -> None:
    log = RoutingLog(4)
    run(log, (0, [[1]]))
    with log.recording() as first:
        run(log, (0, [[2]]))
    run(log, (0, [[3]]))
    with log.recording() as second:
        pass
    assert first.trace.chosen.tolist() == [[2]]
    assert second.trace.num_tokens() == 0


def test_what_a_layer_chose_is_copied() -> None:
    """The kernels write the next step's choice to the same place."""
    chosen = np.array([[1, 2]], dtype=np.uint8)
    log = RoutingLog(4)
    with log.recording() as recording, log.step():
        log.record(0, chosen)
        chosen[:] = 3
    assert recording.trace.chosen.tolist() == [[1, 2]]


def test_another_thread_may_record_while_the_trace_is_read() -> None:
    log = RoutingLog(4)

    def engine() -> None:
        for _ in range(2000):
            run(log, (0, [[1, 2]]), (1, [[0, 2]]))

    with log.recording() as recording:
        thread = threading.Thread(target=engine)
        thread.start()
        while thread.is_alive():
            trace = recording.trace
            assert len(trace.chosen) == trace.calls[:, 2].sum()
            assert len(trace.calls) % 2 == 0
        thread.join()
    assert recording.trace.num_tokens() == 2000


def test_only_one_records_at_a_time() -> None:
    log = RoutingLog(4)
    with log.recording(), pytest.raises(InvalidRequestError, match="recorded already"), log.recording():
        pass
    with log.recording():
        pass


def test_a_step_that_is_not_recorded_from_its_beginning_to_its_end_is_left_out() -> None:
    log = RoutingLog(4)
    with log.step():
        log.record(1, np.array([[0]]))
        with log.recording() as late:
            assert not log.is_recording
            log.record(2, np.array([[0]]))
    with log.recording() as cut, pytest.raises(TypeError):
        run(log, (1, [[1]]), 2)  # type: ignore[arg-type]
    recording = log.recording()
    with recording as early:
        step = log.step()
        step.__enter__()
        log.record(1, np.array([[2]]))
    step.__exit__(None, None, None)
    for found in (late, cut, early):
        assert found.trace.num_tokens() == 0
    assert not log.is_recording


@pytest.mark.parametrize("max_tokens", [0, -1, 2.5, None])
def test_a_limit_that_is_no_number_of_tokens_is_refused(max_tokens: object) -> None:
    log = RoutingLog(4)
    with pytest.raises(InvalidRequestError, match="max_tokens must be"), log.recording(max_tokens):  # type: ignore[arg-type]
        pass


def test_a_full_recording_has_no_holes_and_says_what_it_missed() -> None:
    log = RoutingLog(4)
    with log.recording(max_tokens=3) as recording:
        for num_tokens in (2, 2, 1):
            run(log, *((layer, [[0]] * num_tokens) for layer in (1, 2)))
    trace = recording.trace
    assert (trace.num_tokens(), trace.missed_tokens) == (2, 3)
    assert trace.counts().sum(axis=1).tolist() == [2, 2]
    assert "3 more came when it was full" in repr(trace)


def test_a_replay_counts_what_the_cache_holds() -> None:
    # By hand, with room for all: of 3 + 3 and four times 2 experts each of the 8 is missed once.
    assert TRACE.replay(8) == pytest.approx((14 - 8) / 14)
    # With two slots every layer evicts what the other one used.
    assert TRACE.replay(2) == 0


def test_a_replay_does_not_count_prompts_but_remembers_them() -> None:
    prompt = [[0, 1]] * 17
    trace = recorded((0, prompt), (0, [[0, 2]]))
    assert trace.replay(4) == 0.5


def test_a_prompt_may_use_more_experts_than_there_are_slots() -> None:
    prompt = [[expert] for expert in range(4)] * 5
    assert recorded((0, prompt), (0, [[3]])).replay(2) == 1


def test_a_replay_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="a cache of 1 experts, where a token chooses 2"):
        TRACE.replay(1)
    with pytest.raises(InvalidRequestError, match="no step of text tokens"):
        recorded((0, [[0, 1]] * 17)).replay(2)
    with pytest.raises(InvalidRequestError, match="no step of vision tokens"):
        TRACE.replay(2, "vision")


def test_a_saved_trace_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace"  # no suffix is added
    TRACE.save(path)
    loaded = RoutingTrace.load(path)
    assert repr(loaded) == repr(TRACE)
    assert np.array_equal(loaded.calls, TRACE.calls)
    assert np.array_equal(loaded.chosen, TRACE.chosen)
    assert loaded.chosen.dtype == np.uint8
    assert loaded.replay(4) == TRACE.replay(4)


def test_an_empty_trace_can_be_saved_and_drawn(tmp_path: Path) -> None:
    trace = recorded()
    trace.save(tmp_path / "trace.npz")
    loaded = RoutingTrace.load(tmp_path / "trace.npz")
    assert repr(loaded) == "<RoutingTrace of 0 text tokens: 0 of 4 experts in 0 layers>"
    assert loaded.counts().shape == (0, 4)
    ElementTree.fromstring(loaded.heat_map())


@pytest.mark.parametrize("content", [b"", b"no trace", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="holds no routing trace"):
        RoutingTrace.load(path)


def test_a_trace_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    TRACE.save(path)
    whole = path.read_bytes()
    for num_bytes in range(0, len(whole), 40):
        path.write_bytes(whole[:num_bytes])
        with pytest.raises(InvalidRequestError, match="holds no routing trace"):
            RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"calls": [[0, 0, 3]]}, "its calls are not those of 2 tokens"),
        ({"calls": [[0, 2, 2]]}, "its calls are not those of 2 tokens"),
        ({"calls": [[0, 0, 3], [0, 0, -1]]}, "its calls are not those of 2 tokens"),
        ({"calls": [0, 0, 2]}, "another shape"),
        ({"chosen": [[0, 1], [2, 4]]}, "experts beyond the 4"),
        ({"chosen": [[0, 1], [2, -1]]}, "experts beyond the 4"),
        ({"chosen": [[0.0, 1.0], [2.0, 3.0]]}, "whole numbers"),
        ({"num_experts": [4]}, "another shape"),
        ({"chosen": None}, "chosen"),
        ({"chosen": [[{}, 1], [2, 3]]}, "pickle"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    arrays: dict[str, object] = {"num_experts": 4, "missed_tokens": 0, "calls": [[0, 0, 2]], "chosen": [[0, 1], [2, 3]]}
    path = tmp_path / "trace.npz"
    arrays.update(changed)
    np.savez(path, **{name: np.array(array) for name, array in arrays.items() if array is not None})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=message):
        RoutingTrace.load(path)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no file .*missing\.npz"):
        RoutingTrace.load(tmp_path / "missing.npz")
    with pytest.raises(InvalidRequestError, match="holds no routing trace"):
        RoutingTrace.load(tmp_path)
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        TRACE.save(tmp_path / "missing" / "trace.npz")


def test_the_heat_map_is_darkest_where_most_tokens_went() -> None:
    root = ElementTree.fromstring(TRACE._repr_svg_())
    by_colour = {
        path.get("fill"): re.findall(r"M(\d+) (\d+)h", path.get("d") or "")
        for path in root.iter("{http://www.w3.org/2000/svg}path")
    }
    cells = [cell for found in by_colour.values() for cell in found]
    assert len(cells) == len(set(cells)) == 8
    xs, ys = sorted({int(x) for x, _ in cells}), sorted({int(y) for _, y in cells})
    darkest = by_colour["#08305c"]
    assert [(xs.index(int(x)), ys.index(int(y))) for x, y in darkest] == [(1, 0)]  # expert 1 of layer 1: 4 of 4 tokens
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Experts chosen for 4 tokens" in texts
    assert {"0.0%", "100.0%", "1", "2"} <= set(texts)
    assert any("50.0% if all were used alike" in (text or "") for text in texts)
