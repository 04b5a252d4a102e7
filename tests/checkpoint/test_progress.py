from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest

from ernie45.checkpoint.progress import byte_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with byte_progress("Loading tiny-dense", 5_800_000, show=True) as advance:
        advance(2_000_000)
        advance(3_800_000)
    last_line = terminal.getvalue().split("\r")[-1]
    assert last_line.startswith("Loading tiny-dense: 100%")
    assert "5.80M/5.80M" in last_line


def test_nothing_is_printed_when_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with byte_progress("Loading", 10, show=False) as advance:
        advance(10)
    assert terminal.getvalue() == ""


def test_nothing_is_printed_into_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    with byte_progress("Loading", 10, show=True) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("config", "shown"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_sees_the_bar_though_it_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, object], shown: bool
) -> None:
    ipython = ModuleType("IPython")
    ipython.__dict__["get_ipython"] = lambda: SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(sys, "stderr", output := io.StringIO())
    with byte_progress("Loading", 10, show=True) as advance:
        advance(10)
    assert ("Loading: 100%" in output.getvalue()) == shown


def test_several_threads_may_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with byte_progress("Loading", 4_000, show=True) as advance, ThreadPoolExecutor(4) as pool:
        list(pool.map(advance, [1] * 4_000))
    assert "4.00k/4.00k" in terminal.getvalue().split("\r")[-1]
