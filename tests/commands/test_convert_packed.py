"""`ernie45 convert --quantization`: the packed format without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.checkpoint.headers import read_headers, read_json
from ernie45.cli import main
from ernie45.commands.convert import convert
from ernie45.errors import CheckpointError, InvalidRequestError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import save_checkpoint
from tests.gptq_files import write_gptq_folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_what_saving_writes(
    small_folder_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(small_folder_path, tmp_path / "saved", PRESETS["int4"], progress=False)
    status = main(["convert", str(small_folder_path), str(tmp_path / "out"), "--quantization", "int4"])
    assert status == 0
    assert content(tmp_path / "out") == content(tmp_path / "saved")
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: " in printed
    assert "SHA256SUMS" not in printed


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
