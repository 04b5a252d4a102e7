"""The quality report: right replies, perplexity and logits of each preset, and what could not be loaded."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from ernie45.cli import main
from ernie45.commands import quality as module
from ernie45.commands.quality import WINDOW_TOKENS, quality
from ernie45.commands.quality_report import QualityReport
from ernie45.errors import InvalidRequestError, OutOfMemoryError
from ernie45.presets import QuantPreset
from ernie45.testing import task_names, tasks

TEXT = "the cat sat on the mat, and that is the hat of the cat 你好，世界"
NUM_ITEMS = 1


@pytest.fixture(scope="module")
def report() -> QualityReport:
    return quality(
        "ernie45/tiny-moe", presets=("int8", "int4"), kv_dtypes=("int8",), num_items=NUM_ITEMS, seed=3, progress=False
    )


@pytest.fixture(scope="module")
def quantised(small_folder_path: Path) -> Iterator[ErnieModel]:
    with ErnieModel.from_pretrained(small_folder_path, quantization="int8", progress=False) as model:
        yield model


def written(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_preset_with_every_kv_dtype(report: QualityReport) -> None:
    pairs = [(row.preset, row.kv_dtype) for row in report.rows]
    assert pairs == [(name, kv_dtype) for name in ("none", "int8", "int4") for kv_dtype in ("auto", "int8")]
    none, none_int8_cache, int8, _, int4, _ = report.rows
    assert report.reference is none
    assert (none.agreement, none.logits_error) == (1, 0)
    assert 0 < none_int8_cache.logits_error < 0.05
    assert 0 < int8.logits_error < int4.logits_error < 0.3
    assert none.bytes_per_parameter == pytest.approx(2, abs=0.02)  # the router is in float32
    assert none.weight_bytes == none_int8_cache.weight_bytes
    assert int8.weight_bytes < 0.55 * none.weight_bytes
    assert int4.weight_bytes < 0.4 * none.weight_bytes
    assert report.notes == ()


def test_replies_are_scored_in_the_form_they_were_learnt_in(report: QualityReport) -> None:
    assert 1 < report.reference.perplexity < 1.2
    assert report.num_compared == report.num_tokens > 50
    assert report.texts == "right replies to unseen questions"


def test_right_replies_are_counted(report: QualityReport) -> None:
    names = task_names("ernie45/tiny-moe")
    assert all(tuple(row.num_right) == names for row in report.rows)
    with ErnieModel.from_pretrained("ernie45/tiny-moe", quantization="none", progress=False) as model:
        for name in ("recall", "sums"):
            items = tasks(name, NUM_ITEMS, seed=3, split="test")
            right = sum(model.chat(item.messages, temperature=0).text == item.answer for item in items)
            assert report.reference.num_right[name] == right
    assert report.accuracy(report.reference) == sum(report.reference.num_right.values()) / (11 * NUM_ITEMS) > 0.8


def test_a_text_is_scored_in_windows(
    small_folder_path: Path, small_model: ErnieModel, quantised: ErnieModel, tmp_path: Path
) -> None:
    report = quality(small_folder_path, presets=("int8",), text_file=written(tmp_path, TEXT * 20), progress=False)
    ids = small_model.tokenizer.encode(TEXT * 20)
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, len(ids), WINDOW_TOKENS)]
    assert len(windows) > 1
    logprobs = [logprob for window in windows for logprob in small_model.score(window).logprobs]
    none, int8 = report.rows
    assert report.num_tokens == len(logprobs)
    assert none.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4)
    exact, rounded = (
        torch.cat([model.logits(window)[:-1] for window in windows]) for model in (small_model, quantised)
    )
    assert int8.logits_error == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-3)
    assert int8.agreement == pytest.approx(float((rounded.argmax(1) == exact.argmax(1)).float().mean()))
    assert report.texts == "text.txt"
    assert none.num_right == {}
    assert "RIGHT REPLIES" not in str(report)


def test_any_model_has_a_text(small_folder_path: Path) -> None:
    report = quality(small_folder_path, presets=[QuantPreset(name="experts alone", experts="int4")], progress=False)
    assert report.texts == "a short text in English and Chinese"
    assert [row.preset for row in report.rows] == ["none", "experts alone"]
    assert report.rows[1].logits_error == 0  # a dense model has no experts


def test_logits_are_kept_as_far_as_there_is_room(small_folder_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 1 << 18)
    report = quality(small_folder_path, presets=("int8",), progress=False)
    assert report.num_compared == WINDOW_TOKENS - 1 < report.num_tokens
    assert f"note: LOGITS ERROR is of the first {WINDOW_TOKENS - 1} tokens" in str(report)
    assert 0 < report.rows[1].logits_error < 0.1
    assert 0.5 < report.rows[1].agreement < 1


def test_the_best_that_fits_is_the_reference(
    small_folder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = ErnieModel.from_pretrained
    refused = ["none"]

    def load_in_little_memory(*arguments: Any, quantization: QuantPreset, **options: Any) -> ErnieModel:
        memory = "1KiB" if quantization.name in refused else None
        return load(*arguments, quantization=quantization, memory=memory, **options)

    monkeypatch.setattr(ErnieModel, "from_pretrained", load_in_little_memory)
    text_file = written(tmp_path, TEXT)
    report = quality(small_folder_path, presets=("int8", "int4"), text_file=text_file, progress=False)
    assert report.reference.preset == "int8"
    assert report.reference.logits_error == 0 < report.rows[1].logits_error
    (note,) = report.notes
    assert note.startswith("none (keys and values: auto) was left out: ")
    assert "compared with 'int8'" in str(report)
    assert note in str(report)
    refused += ["int8", "int4"]
    with pytest.raises(OutOfMemoryError):
        quality(small_folder_path, presets=("int8", "int4"), text_file=text_file, progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presets": ("int9",)}, "'int9'"),
        ({"presets": ("auto",)}, "depends on the machine"),
        ({"kv_dtypes": ("int4",)}, "'int4'"),
        ({"num_items": 0}, "n is 0"),
        ({"text_file": "no-such-file.txt"}, "no-such-file.txt cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        quality("ernie45/tiny-dense", progress=False, **options)


def test_a_text_of_one_token_is_refused(small_folder_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="at least two tokens, not 1"):
        quality(small_folder_path, presets=(), text_file=written(tmp_path, "a"), progress=False)


def test_the_command_prints_a_table_or_json(
    small_folder_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quality", str(small_folder_path), "--presets", "int8", "--text", str(written(tmp_path, TEXT))]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["preset"] for row in rows] == ["none", "int8"]
    assert f"{rows[1]['perplexity']:.4f}" in table
    assert main(["quality", str(small_folder_path), "--presets", "int9"]) == 2
    assert "\n  -> " in capsys.readouterr().err


def test_the_table_shows_tasks(report: QualityReport) -> None:
    lines = str(report).splitlines()
    assert lines[0].startswith("ernie45/tiny-moe, compared with 'none' (keys and values: auto); scored: right replies")
    (header,) = [line for line in lines if line.startswith("RIGHT REPLIES, %")]
    assert header.split() == ["RIGHT", "REPLIES,", "%", "none", "none,", "kv", "int8", "int8", "int8,", "kv", "int8",
                              "int4", "int4,", "kv", "int8"]  # fmt: skip
    assert lines[-1].split()[1] == f"{100 * report.accuracy(report.reference):.2f}"
    assert json.loads(report.json())["rows"][0]["num_right"] == report.reference.num_right


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys\nfrom ernie45.cli import main\n"
        "try:\n    main(['quality', '--help'])\nfinally:\n    print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.endswith("False\n")
    assert "--kv-dtype" in run.stdout


def test_layers_from_the_command_line(small_folder_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--layers", str(small_folder_path), "--max-layers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [0]


def test_the_command_measures_a_model_or_layers(small_folder_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small_folder_path)
    for option, arguments in (
        ("MODEL", ["ernie45/tiny-dense"]),
        ("--presets", ["--presets", "int8"]),
        ("--kv-dtype", ["--kv-dtype", "auto"]),
        ("--items", ["--items", "0"]),
        ("--text", ["--text", "text.txt"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["quality", *arguments, "--layers", folder])
        assert caught.value.code == 2
        assert f"argument --layers: not allowed with argument {option}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["quality", folder, "--max-layers", "2"])
    assert caught.value.code == 2
    assert "argument --max-layers: needs argument --layers\n" in capsys.readouterr().err
    assert main(["quality", "--layers", folder, "--max-layers", "0"]) == 2
    assert "max_layers is 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--presets", "--kv-dtype"])
@pytest.mark.parametrize("names", ["int8,", ",int8", "auto,,int8", ""])
def test_a_missing_name_is_told_with_its_option(names: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["quality", option, names])
    assert caught.value.code == 2
    assert f"argument {option}: a name is missing in {names!r}\n" in capsys.readouterr().err
