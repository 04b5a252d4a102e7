"""Every example runs offline, in a process of its own, and what it prints is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

REPO_ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = REPO_ROOT / "examples"
IMAGES = REPO_ROOT / "docs" / "images"

EXPECTED = {
    "quickstart.py": ["What is 12 + 30? 12 + 30 = 42", "Paris", "TENALP", "7, 15, 42, 93"],
    "streaming.py": ["三百四十七\n", "smallest: 7\n"],
    "batching.py": ["Tokyo (stop)\n", "\n4 (stop)\n"],
    "async_tasks.py": [
        "What is 12 + 30? 12 + 30 = 42\n",
        "What is the capital of Peru? Lima\n",
        "Reverse the word STONE. ENOTS\n",
        "gave up on the long one\n",
    ],
    "larger_than_memory.py": [
        "\n   6GiB: streams, 755 of 1,728 experts in memory, 2.2 GB read for a token\n",
        "\n  12GiB: fits\n",
        "\n   8GiB: does not fit\n",
        "\n  24GiB: streams, 340 of 3,264 experts in memory, ",
        " tokens through 3 layers of 8 experts\n  with 6 in memory, ",
    ],
    "expert_traffic.py": [
        " text tokens: 2 of 8 experts in 3 layers>\nlayer 1: [",
        "\nwith 4 of 24 experts in memory, ",
        "\nsaved; the same picture when loaded again: True\n",
    ],
    "memory_plan.py": [
        "ERNIE-4.5-0.3B-PT       none, 0.7 GiB of weights: fits\n",
        "ERNIE-4.5-21B-A3B-PT    int8, 20.4 GiB of weights: fits\n",
        "ERNIE-4.5-VL-28B-A3B-PT int4, 15.8 GiB of weights: fits\n",
        "ERNIE-4.5-300B-A47B-PT  int4, 20.7 GiB of weights: streams\n",
        "\nRemedies    1. It fits with ",
        "\ncuda:0 has attention of 28 layers and experts of ",
        "\ncpu has attention of 0 layers and experts of ",
        "\nrefused: this needs ",
    ],
    "pictures.py": [
        "image 112 x 84: 12 tokens, ",
        "shape: circle\nplace: top left\nsecond: blue\nclip: The blue square moved right.\n",
    ],
    "quantised.py": [
        "\nexperts only ",
        "; the same logits when loaded again: True\n",
        "\nKV cache in int8: ",
    ],
    "scoring.py": ["Paris: probability"],
    "testing_your_code.py": ["2 tests passed\n"],
    "thinking.py": [
        "reasoning: 12 + 30 = 42, 42 + 9 = 51\nanswer: 51\n",
        ")51\n",
        "next answer: 46\n",
        "after 4 tokens of reasoning (",
    ],
}


def test_every_example_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_answers_are_right(name: str) -> None:
    output = _run(name)
    assert [answer for answer in EXPECTED[name] if answer not in output] == [], output
    if name == "batching.py":
        _check_share(output)
    if name == "expert_traffic.py":
        rates = [int(rate) for rate in re.findall(r"in memory, (\d+)% were found there", output)]
        assert rates == sorted(rates), output
        assert rates[0] < 50 < 95 < rates[-1], output
    if name == "memory_plan.py":
        _check_weights(output)
    if name == "quantised.py":
        assert re.findall(r": (\d+)$", output, flags=re.MULTILINE) == ["51"] * 6, output
    if name == "scoring.py":
        _check_probabilities(output)


def test_the_documentation_shows_what_the_example_asks_about(tmp_path: Path) -> None:
    _run("pictures.py", str(tmp_path))
    drawn = {path.name: _frames(path) for path in tmp_path.iterdir()}
    assert drawn == {path.name: _frames(path) for path in IMAGES.iterdir()}


def _frames(path: Path) -> list[bytes]:
    """The pixels of a picture, or of each frame of a clip; how they are compressed differs between versions."""
    with Image.open(path) as image:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]


def _check_share(output: str) -> None:
    right = re.search(r"(\d+) of 20 right", output)
    assert right is not None, output
    assert int(right[1]) >= 18


def _check_weights(output: str) -> None:
    sizes = re.search(r"planned ([\d,]+) bytes of weights, loaded ([\d,]+)\n", output)
    assert sizes is not None, output
    assert sizes[1] == sizes[2]


def _check_probabilities(output: str) -> None:
    probability = {city: float(value) for city, value in re.findall(r"(\w+): probability ([\d.]+)", output)}
    assert probability["Paris"] > 0.9
    assert max(probability["Berlin"], probability["Madrid"]) < 0.05


def _run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
