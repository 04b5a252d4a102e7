"""What the benchmark of streaming makes of its measurements: shares, medians, a table and a picture."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.line_plot import draw_lines
from benchmarks.memory_group import MemoryGroup
from benchmarks.streamed_decoding import Decoded, Report
from benchmarks.streaming import Measured, as_table, plot

# Of 400 experts 100 were missed: 30 were read when they were wanted, 70 ahead; 20 were read in vain.
PART = Decoded(
    rows=1,
    num_tokens=5,
    seconds=1.0,
    num_chosen=200,
    misses=15,
    guesses=45,
    good_guesses=35,
    read_bytes=60_000,
    stall_seconds=0.1,
)
WHOLE = Decoded.together([PART, PART])


def measured(limit: str, *, peer_rates: tuple[float, ...] = ()) -> Measured:
    report = Report(
        expert_slots=40,
        num_experts=100,
        even_hit_rate=0.3,
        hit_rate=0.4,
        read_bytes=12_000_000,
        seconds=0.25,
        disk_rates=[80_000.0, 120_000.0],
        peak_bytes=3 * 2**30,
        decoded=[WHOLE],
    )
    return Measured(limit=limit, is_grouped=True, reports=[report], peer_rates=peer_rates)


def test_missed_are_those_read_when_wanted_and_those_guessed_rightly() -> None:
    assert (WHOLE.rows, WHOLE.num_tokens, WHOLE.num_chosen) == (1, 10, 400)
    assert WHOLE.hit_rate == pytest.approx(0.75)
    assert WHOLE.missed_bytes == pytest.approx(10_000)  # 100 of 120 read, of 1,000 bytes, in 10 tokens
    assert WHOLE.tokens_per_second == 5


def test_a_table_has_planned_before_measured() -> None:
    row = as_table([measured("6GiB")]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("6GiB", "40 of 100", "30%", "40% / 75%", "12 / 0", "0", "0.250 / 0.200"),
        *("0.020", "0.00", "50%", "3.00"),  # 5 tokens a second, of 100,000 bytes a second over 10,000 a token
    ]


def test_what_was_not_planned_to_stream_has_no_numbers_for_it() -> None:
    resident = Report(
        expert_slots=None,
        num_experts=None,
        even_hit_rate=None,
        hit_rate=None,
        read_bytes=None,
        seconds=0.1,
        disk_rates=[1e9],
        peak_bytes=2**30,
        decoded=[replace(PART, num_tokens=2, seconds=0.5, misses=0, guesses=0, good_guesses=0, read_bytes=0)],
    )
    row = as_table([Measured(limit="12GiB", is_grouped=True, reports=[resident], peer_rates=[])]).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["all", "", "", "", "", "0.100 / 0.250"]


def test_the_picture_has_a_point_for_each_limit_and_line() -> None:
    machine = {"cpu": "A < B", "cores": 2}
    root = ET.fromstring(plot("a model", [measured("4GiB"), measured("8GiB", peer_rates=(0.5,))], machine))
    assert len(root.findall("{*}polyline")) == 3
    assert len(root.findall("{*}circle")) == 5
    assert {"measured", "planned", "llama.cpp", "4", "8"} <= {text.text for text in root.findall("{*}text")}


def test_higher_is_further_up_and_more_further_right() -> None:
    root = ET.fromstring(draw_lines("", "", ("", ""), {"line": [(4, 1.0), (8, 3.0)]}))
    first, second = ((float(each.get("cx", "")), float(each.get("cy", ""))) for each in root.findall("{*}circle"))
    assert second[0] - 70 == pytest.approx(2 * (first[0] - 70), abs=0.2)
    assert 350 - second[1] == pytest.approx(3 * (350 - first[1]), abs=0.4)


def test_a_command_puts_itself_into_the_group(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    command = MemoryGroup(folder=tmp_path).command(("sh", "-c", 'echo $$ "$0"', "a b"))
    pid, argument = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    assert (tmp_path / "cgroup.procs").read_text() == f"{pid}\n"
    assert argument == "a b\n"
    assert MemoryGroup(folder=None).command(["true"]) == ("true",)
