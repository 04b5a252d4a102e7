"""`ernie45 convert --quantization`: the packed format without loading a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ernie45.checkpoint.headers import read_headers, read_json
from ernie45.checkpoint.progress import Advance
from ernie45.cli import main
from ernie45.commands import convert as convert_module
from ernie45.commands.convert import convert
from ernie45.errors import CheckpointError, InvalidRequestError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import save_checkpoint
from tests.full_disk import fill_disk_after
from tests.gptq_files import write_gptq_folder
from tests.paddle_files import CONFIG, EXPERTS, random_pt, write_checkpoint

# Its embedding's scales are no whole lines, so that they are written apart from its codes.
MIXTURE = {**CONFIG, **EXPERTS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32}
SHARD_BYTES = 20_000


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_what_saving_writes(
    small_folder_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(small_folder_path, tmp_path / "saved", PRESETS["int4"], progress=False)
    status = main(["convert", str(small_folder_path), str(tmp_path / "out"), "--quantization", "int4"])
    assert status == 0
    sums = (tmp_path / "out" / "SHA256SUMS").read_bytes()
    assert content(tmp_path / "out") == {**content(tmp_path / "saved"), "SHA256SUMS": sums}
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: " in printed
    assert "sha256sum -c SHA256SUMS" in printed


def test_report_of_a_packed_folder(shared_fixtures: Path, tmp_path: Path) -> None:
    source = shared_fixtures / "paddle" / "moe-mtp"
    preset = QuantPreset(name="experts only", experts="int8")
    report = convert(source, tmp_path / "out", quantization=preset, max_shard_bytes=100_000, progress=False)
    index = read_headers(tmp_path / "out")
    assert (report.layout, report.was_finished, report.resumed_bytes) == ("paddle", False, 0)
    assert report.num_tensors == len(index.tensors)
    assert report.num_bytes == sum(len(data) for data in content(tmp_path / "out").values())
    assert set(report.files) == set(content(tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    assert "model.mtp_linear_proj.0.weight" in index.tensors
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["preset"]["name"] == "experts only"


def test_a_quantised_folder_does_not_become_a_pt_one(small_folder_path: Path, tmp_path: Path) -> None:
    convert(small_folder_path, tmp_path / "packed", quantization="int8", progress=False)
    with pytest.raises(UnsupportedError, match="holds quantised weights"):
        convert(tmp_path / "packed", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_gptq_matrices_do_not_become_those_of_a_preset(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=64, intermediate_size=96, tokenizer=False)
    write_gptq_folder(source, tmp_path / "gptq", tmp_path / "reference")
    assert main(["convert", str(tmp_path / "gptq"), str(tmp_path / "out"), "--quantization", "int8"]) != 0
    assert "'int8' cannot be had of weights that are stored as 'gptq'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("destination", [None, 5, "", "~nouser/out", "a\0b"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_destination_must_be_a_folder(small_folder_path: Path, destination: Any, quantization: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"names no folder|home folder of a user"):
        convert(small_folder_path, destination, quantization=quantization, progress=False)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_name_that_is_too_long_is_an_error_of_ours(
    small_folder_path: Path, tmp_path: Path, quantization: str
) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        convert(small_folder_path, tmp_path / ("x" * 300), quantization=quantization, progress=False)


def test_the_preset_must_be_named(small_folder_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="needs to know the preset"):
        convert(small_folder_path, tmp_path / "out", quantization="auto", progress=False)
    with pytest.raises(InvalidRequestError, match="'int5' is unknown"):
        convert(small_folder_path, tmp_path / "out", quantization="int5", progress=False)
    with pytest.raises(UnsupportedError, match="'nf4'"):
        convert(small_folder_path, tmp_path / "out", quantization="nf4", progress=False)
    with pytest.raises(InvalidRequestError, match="lies in the source"):
        convert(small_folder_path, small_folder_path / "out", quantization="int4", progress=False)


@pytest.fixture
def paddle(tmp_path: Path) -> Path:
    tensors = random_pt(MIXTURE)
    return write_checkpoint(tmp_path / "paddle", tensors, MIXTURE, layout="paddle", dtype="U16", num_shards=2)


def pack(source: Path, folder: Path, quantization: str = "int4", shard_bytes: int = SHARD_BYTES) -> Any:
    return convert(source, folder, quantization=quantization, max_shard_bytes=shard_bytes, progress=False)


@pytest.fixture
def cut(paddle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose conversion ran into a full disk in its third file."""
    monkeypatch.setattr(convert_module, "SYNC_BYTES", SHARD_BYTES // 5)
    with monkeypatch.context() as patch:
        fill_disk_after(50_000, patch)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            pack(paddle, tmp_path / "cut")
    assert "run the same command again: it goes on" in caught.value.hint
    return tmp_path / "cut"


def marked_bytes(folder: Path) -> int:
    return sum(entry["num_bytes"] for entry in read_json(folder / ".ernie45-convert.json")["files"].values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills as Linux does; not tried elsewhere")
@pytest.mark.parametrize(("name", "shard_bytes"), [("paddle", SHARD_BYTES), ("ernie45/tiny-moe", 1_000_000)])
def test_killed_and_resumed_gives_the_bytes_of_an_uninterrupted_run(
    paddle: Path, tmp_path: Path, name: str, shard_bytes: int
) -> None:
    """Ten random points, again and again on one folder, and before every rename, deletion and flush."""
    source = str(paddle) if name == "paddle" else name
    script = Path(__file__).with_name("killed_convert.py")
    (tmp_path / "out").mkdir()
    run = subprocess.run(
        [sys.executable, str(script), source, str(tmp_path / "out"), "int4", str(shard_bytes)],
        capture_output=True, text=True, check=False, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["differing"] == []
    assert len(result["points"]) == 10
    assert len([name for name in result["files"] if name.endswith(".safetensors")]) >= 4
    assert all(".ernie45-convert.json" in names and "config.json" not in names for names in result["unfinished"][:5])
    assert result["num_kills"] > 2
    assert result["num_steps"] > 60


def test_what_is_packed_is_not_packed_again(
    cut: Path, paddle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = marked_bytes(cut)
    assert 35_000 < done < 50_000
    totals = []

    @contextmanager
    def byte_progress(description: str, total_bytes: int, *, show: bool) -> Iterator[Advance]:
        advanced: list[int] = []
        yield advanced.append
        totals.append((total_bytes, sum(advanced)))

    monkeypatch.setattr(convert_module, "byte_progress", byte_progress)
    report = pack(paddle, cut)
    whole = pack(paddle, tmp_path / "whole")
    assert content(cut) == content(tmp_path / "whole")
    weight_bytes = sum(file.stat().st_size for file in cut.glob("*.safetensors"))
    assert totals == [(weight_bytes - done,) * 2, (weight_bytes,) * 2]
    assert (report.resumed_bytes, whole.resumed_bytes) == (done, 0)
    assert f"went on after {done:,} bytes of an earlier run" in str(report)


def test_a_finished_packed_folder_is_left_alone(paddle: Path, tmp_path: Path) -> None:
    pack(paddle, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = pack(paddle, tmp_path / "out")
    assert report.was_finished
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(InvalidRequestError, match="holds another checkpoint"):
        pack(paddle, tmp_path / "out", "int8")


def test_an_unfinished_packed_folder_is_for_the_same_conversion_only(cut: Path, paddle: Path, tmp_path: Path) -> None:
    before = content(cut)
    for quantization, shard_bytes in (("int8", SHARD_BYTES), ("none", SHARD_BYTES), ("int4", 2 * SHARD_BYTES)):
        with pytest.raises(InvalidRequestError, match="unfinished conversion of another"):
            pack(paddle, cut, quantization, shard_bytes)
    other = shutil.copytree(paddle, tmp_path / "other")
    assert pack(other, tmp_path / "out").num_bytes > 0  # a copy is the same source
    info = read_headers(other).tensors["ernie.layers.2.mlp.experts.3.down_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(b"\0\0")
    with pytest.raises(InvalidRequestError, match="unfinished conversion of another"):
        pack(other, cut)
    assert content(cut) == before


def test_the_disk_needs_room_for_what_is_missing(cut: Path, paddle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = sum(len(data) for name, data in content(cut).items() if not name.startswith(".ernie45"))
    assert there > marked_bytes(cut)  # what came after the last mark will be replaced, and takes no more room
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match=r"needs ([\d,]+) bytes, but its disk has 0 free") as caught:
        pack(paddle, cut)
    needed = int(caught.value.message.split(" needs ")[1].split(" bytes")[0].replace(",", ""))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    report = pack(paddle, cut)
    assert needed == report.num_bytes - there - (cut / "SHA256SUMS").stat().st_size


def test_an_interrupt_says_that_the_command_goes_on(
    paddle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_written = 0

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        nonlocal num_written
        num_written += 1
        if num_written == 60:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits for this one
            time.sleep(0.2)
        return whole(descriptor, data, position)

    whole = os.pwrite
    monkeypatch.setattr(convert_module, "SYNC_BYTES", SHARD_BYTES // 5)
    arguments = ["convert", str(paddle), str(tmp_path / "out"), "--quantization", "int4", "--max-shard-size", "20000"]
    # A run that a shell started in the background ignores SIGINT from the start, and Python leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert "run the same command again, and it goes on" in capsys.readouterr().err
    assert marked_bytes(tmp_path / "out") > 0
    assert main(arguments) == 0
    assert "went on after" in capsys.readouterr().out
    pack(paddle, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
