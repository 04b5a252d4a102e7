"""`ernie45 convert` and `ernie45 verify` as they are typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ernie45.cli import main


def test_convert_and_verify(shared_fixtures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = str(shared_fixtures / "paddle" / "dense"), tmp_path / "out"
    assert main(["convert", source, str(folder), "--max-shard-size", "300KB"]) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"{folder}: 29 tensors, ")
    assert "sha256sum -c SHA256SUMS" in first
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    assert main(["convert", source, str(folder), "--max-shard-size", "300KB"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert main(["convert", source, str(folder)]) == 2
    assert "\n  -> " in capsys.readouterr().err
    assert main(["verify", str(folder)]) == 0
    report = capsys.readouterr().out
    assert report.startswith("## ernie45 verify: `out`\n\n**Good.**\n")
    assert "as close as promised" in report


def test_verify_tells_by_its_exit_status(
    small_folder_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(small_folder_path), "--no-compare"]) == 0
    assert "not asked for" in capsys.readouterr().out
    (tmp_path / "config.json").write_bytes((small_folder_path / "config.json").read_bytes())
    assert main(["verify", str(tmp_path)]) == 1
    assert "holds no model.safetensors" in capsys.readouterr().out
    assert main(["verify", "./no-such-folder"]) == 2
    assert "no-such-folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["convert"], ["convert", "only-one"], ["verify"]])
def test_a_mistyped_command_line_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert f"usage: ernie45 {arguments[0]}" in capsys.readouterr().err


HELP_SCRIPT = """
import sys
from ernie45.cli import main
try:
    main(["convert", "--help"])
finally:
    print("torch" in sys.modules)
"""


def test_help_does_not_wait_for_torch() -> None:
    run = subprocess.run([sys.executable, "-c", HELP_SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.endswith("False\n")
    assert "--max-shard-size" in run.stdout
