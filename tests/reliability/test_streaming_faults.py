"""A disk that fails while experts are read from it: an error that says where, never a wrong token, and all is well once
the disk is."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.errors import CheckpointError, CorruptFileError, ErnieError, TensorError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from tests.streamed_models import open_model, tiny

IDS = [(7 * i + i * i) % 1900 + 3 for i in range(40)]
PROMPTS = [IDS[:9], IDS[5:30], IDS[11:14]]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
WHERE = r"expert \d+ of layer [123] could not be read: "


@pytest.fixture(scope="module", params=["packed", "plain"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-moe in int4, and as it is."""
    folder = tmp_path_factory.mktemp("original") / str(request.param)
    if request.param == "packed":
        save_checkpoint(tiny("tiny-moe"), folder, PRESETS["int4"], progress=False)
    else:
        shutil.copytree(tiny("tiny-moe"), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.fixture
def model(folder: Path) -> Iterator[ErnieModel]:
    with open_model(folder, 4, quantization="int4", context_tokens=128, max_batch=3, prefix_cache=False) as opened:
        yield opened


def greedy(model: ErnieModel) -> list[tuple[int, ...]]:
    return [reply.token_ids for reply in model.batch_generate(PROMPTS, **GREEDY)]


def moved_away(file: Path) -> Callable[[], object]:
    file.rename(file.with_suffix(".away"))
    return lambda: file.with_suffix(".away").rename(file)


def cut_short(file: Path) -> Callable[[], object]:
    content = file.read_bytes()
    os.truncate(file, file.stat().st_size // 4)
    return lambda: file.write_bytes(content)


def forbidden(file: Path) -> Callable[[], object]:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file.chmod(0)
    return lambda: file.chmod(0o600)


def replaced_by_a_folder(file: Path) -> Callable[[], object]:
    heal = moved_away(file)
    file.mkdir()

    def back() -> None:
        file.rmdir()
        heal()

    return back


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (moved_away, CheckpointError),
        (cut_short, CorruptFileError),
        (forbidden, CheckpointError),
        (replaced_by_a_folder, CheckpointError),
    ],
)
def test_a_fault_while_tokens_are_generated(
    folder: Path, model: ErnieModel, fault: Callable[[Path], Callable[[], object]], error: type[ErnieError]
) -> None:
    file = weights_of(folder)
    expected, logits = greedy(model), model.logits(IDS)
    long = model.generate(IDS[:9], **{**GREEDY, "max_new_tokens": 60}).token_ids
    for _ in range(2):
        said: list[int] = []
        heals: list[Callable[[], object]] = []

        def answer(said: list[int] = said, heals: list[Callable[[], object]] = heals) -> None:
            for chunk in model.stream_generate(IDS[:9], **{**GREEDY, "max_new_tokens": 60}):
                said += chunk.token_ids
                if not heals:
                    heals.append(fault(file))

        with pytest.raises(error, match=WHERE) as caught:
            answer()
        assert file.name in str(caught.value)
        assert caught.value.hint
        assert tuple(said) == long[: len(said)]
        with pytest.raises(error, match=WHERE):
            model.logits(IDS)
        heals[0]()
        assert torch.equal(model.logits(IDS), logits)
        assert greedy(model) == expected


def test_all_rows_of_a_failing_step_get_the_error_and_a_later_request_works(folder: Path, model: ErnieModel) -> None:
    expected = greedy(model)
    streams = [model.stream_generate(prompt, **{**GREEDY, "max_new_tokens": 90}) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
    heal = moved_away(weights_of(folder))
    errors = []
    for stream in streams:
        with pytest.raises(CheckpointError, match=WHERE) as caught:
            list(stream)
        errors.append(caught.value)
    heal()
    assert len(errors) == 3
    assert greedy(model) == expected


def test_damaged_values_are_an_error_too(folder: Path, model: ErnieModel) -> None:
    """What was checked when it was loaded is checked when it is read again."""
    file = weights_of(folder)
    expected, content = greedy(model), file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(8 + int.from_bytes(content[:8], "little"))
        opened.write(b"\xff" * (len(content) - opened.tell()))
    with pytest.raises(TensorError, match=WHERE + r".* not finite"):
        greedy(model)
    file.write_bytes(content)
    assert greedy(model) == expected


class SlowDisk:
    """Reads sleep a little, some more than others; those that are `stopped` go on when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.may_go, self.num_waiting, draw = 0.0, threading.Event(), 0, random.Random(0)
        self.may_go.set()
        stage = StagedReader.stage

        def slow(
            reader: StagedReader, infos: Sequence[TensorInfo], room: memoryview | None = None
        ) -> tuple[int, ...] | None:
            self.num_waiting += not self.may_go.is_set()
            assert self.may_go.wait(30)
            time.sleep(draw.uniform(0, 2 * self.seconds))
            return stage(reader, infos, room)

        monkeypatch.setattr(StagedReader, "stage", slow)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_a_slow_disk_gives_the_same_answer_later(slow_disk: SlowDisk, model: ErnieModel) -> None:
    expected, logits = greedy(model), model.logits(IDS)
    assert model.stats.experts is not None
    stalled = model.stats.experts.stall_seconds
    slow_disk.seconds = 0.01
    assert greedy(model) == expected
    assert torch.equal(model.logits(IDS), logits)
    assert model.stats.experts.stall_seconds - stalled > 0.1


def test_a_request_is_cancelled_while_it_waits_for_a_read(slow_disk: SlowDisk, model: ErnieModel) -> None:
    expected = greedy(model)

    async def leave() -> None:
        slow_disk.may_go.clear()
        slow_disk.num_waiting = 0
        task = asyncio.create_task(model.agenerate(IDS[:20], **{**GREEDY, "max_new_tokens": 90}))
        while not slow_disk.num_waiting:
            await asyncio.sleep(0.005)
        task.cancel()
        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started < 5, "the caller need not wait for the disk"
        slow_disk.may_go.set()

    asyncio.run(leave())
    assert greedy(model) == expected


def test_closing_while_a_read_is_under_way(slow_disk: SlowDisk, model: ErnieModel) -> None:
    slow_disk.may_go.clear()
    stream = model.stream_generate(IDS[:20], **GREEDY)
    while not slow_disk.num_waiting:
        time.sleep(0.005)
    threading.Timer(0.1, slow_disk.may_go.set).start()
    model.close()
    with pytest.raises(ErnieError):
        list(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ernie45-experts")]
