"""`ernie45 bench`: what it measures, prints and draws."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from ernie45 import ErnieModel
from ernie45.cli import main
from ernie45.commands.bench import bench
from ernie45.commands.bench_report import BenchReport, PresetSpeed
from ernie45.errors import InvalidRequestError

SMALL: dict[str, Any] = {"prompt_tokens": 24, "new_tokens": 5, "batch": 3, "num_repetitions": 2}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that models were given, in order."""
    prompts: list[list[int]] = []
    alone, together = ErnieModel.stream_generate, ErnieModel.batch_generate

    def stream_generate(self: ErnieModel, prompt: Any, **options: Any) -> Any:
        prompts.append(prompt)
        return alone(self, prompt, **options)

    def batch_generate(self: ErnieModel, items: Any, **options: Any) -> Any:
        prompts.extend(items)
        return together(self, items, **options)

    monkeypatch.setattr(ErnieModel, "stream_generate", stream_generate)
    monkeypatch.setattr(ErnieModel, "batch_generate", batch_generate)
    return prompts


def row(**changes: Any) -> PresetSpeed:
    values: dict[str, Any] = {
        "preset": "none",
        "device": "cpu",
        "dtype": "bfloat16",
        "weight_bytes": 2_000_000,
        "load_seconds": 0.5,
        "warm_up_seconds": 1.5,
        "first_token_seconds": [0.2, 0.1, 0.4],
        "decode_rates": [20.0, 30.0, 10.0],
        "batch_rates": [50.0, 40.0, 60.0],
        "peak_bytes": 3_000_000,
        "gpu_peak_bytes": None,
        "planned_peak_bytes": 4_000_000,
        **changes,
    }
    return PresetSpeed(**values)


def report(*rows: PresetSpeed) -> BenchReport:
    return BenchReport(model="a & b", prompt_tokens=100, new_tokens=8, batch=4, machine="one <CPU>", rows=rows)


def test_each_preset_is_measured_with_prompts_never_seen_before(asked: list[list[int]]) -> None:
    lines: list[str] = []
    found = bench("ernie45/tiny-dense", presets=("none", "int8"), report_progress=lines.append, **SMALL)
    assert [each.preset for each in found.rows] == ["none", "int8"]
    none, int8 = found.rows
    for each in found.rows:
        for values in (each.first_token_seconds, each.decode_rates, each.batch_rates):
            assert len(values) == 2
            assert min(values) > 0
        assert each.warm_up_seconds > 0
        assert each.peak_bytes is not None
        assert each.peak_bytes > each.weight_bytes
        assert each.planned_peak_bytes > each.weight_bytes
    assert int8.weight_bytes < 0.6 * none.weight_bytes
    assert [len(prompt) for prompt in asked] == [24] * (2 * 3 * 4)  # presets, rounds with the warm-up, one and a batch
    assert len({tuple(prompt) for prompt in asked}) == len(asked)
    assert len([line for line in lines if "warm-up" in line]) == 2


def test_the_table_has_medians_with_their_spread() -> None:
    text = str(report(row(), row(preset="int8", peak_bytes=None)))
    lines = {line.partition("  ")[0]: line for line in text.splitlines()}
    assert lines["time to first token, ms"].split("  ")[-1].strip() == "200 (100 to 400)"
    assert "500 (250 to 1,000)" in lines["prefill, tokens/s"]
    assert "20.0 (10.0 to 30.0)" in lines["decode, tokens/s"]
    assert "50.0 (40.0 to 60.0)" in lines["4 at a time, tokens/s"]
    assert lines["peak, MB"].split()[-2:] == ["3.0", "-"]
    assert lines["warm-up: first token, ms"].split()[-1] == "1,500"
    assert "medians of 3" in text
    assert "GPU" not in text
    assert text.endswith("one <CPU>")


def test_memory_of_a_gpu_is_shown() -> None:
    (line,) = [line for line in str(report(row(gpu_peak_bytes=7_000_000))).splitlines() if "GPU" in line]
    assert line.split() == ["peak", "of", "the", "GPU,", "MB", "7.0"]


def test_the_picture_has_a_bar_for_each_number() -> None:
    root = ElementTree.fromstring(report(row(), row(preset="int8", decode_rates=[40.0, 40.0, 40.0])).svg())
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == "a & b: prompts of 100 tokens, 8 new"
    assert texts[-1] == "one <CPU>"
    background, *bars = root.iter(f"{SVG}rect")
    assert len(bars) == 5 * 2
    decode = [float(bar.attrib["width"]) for bar in bars[4:6]]
    assert decode[0] == pytest.approx(decode[1] / 2)
    right = max(float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in bars)
    assert right < float(background.attrib["width"])
    assert "peak memory, MB" in texts
    assert "peak memory, MB (planned)" in report(row(peak_bytes=None)).svg()


def test_the_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "speed.svg"
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--batch", "2", "--repetitions", "1"]
    assert main(["bench", "--quantization", "int8,int4", *options, "--json", "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["model"] == "ernie45/tiny-dense"
    assert (found["prompt_tokens"], found["new_tokens"], found["batch"]) == (16, 4, 2)
    assert [each["preset"] for each in found["rows"]] == ["int8", "int4"]
    assert "warm-up" in err
    assert ElementTree.parse(plot).getroot().tag == f"{SVG}svg"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"num_repetitions": 0}, "num_repetitions is 0"),
        ({"presets": ["int9"]}, "int9"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        bench("ernie45/tiny-dense", **{**SMALL, **changes})


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt-tokens", "4", "--new-tokens", "2", "--batch", "1", "--repetitions", "1"]
    assert main(["bench", *options, "--plot", str(tmp_path / "none" / "a.svg")]) == 2
    out, err = capsys.readouterr()
    assert "decode, tokens/s" in out
    assert "cannot be written" in err
