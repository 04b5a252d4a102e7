from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ernie45 import catalogue
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.read import TensorReader
from ernie45.checkpoint.resolve import resolve
from ernie45.errors import CheckpointError, InvalidRequestError, ModelNotFoundError

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `org/model` below the current one and below the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("spelling", ["org/model", "./org/model", "~/org/model", "org/../org/model"])
def test_an_existing_folder_is_used_as_it_is(folder: Path, spelling: str) -> None:
    assert resolve(spelling).resolve() == folder.resolve()


def test_paths_may_be_path_objects(folder: Path) -> None:
    assert resolve(folder) == folder
    assert resolve(Path("org/model")) == Path("org/model")


@pytest.mark.parametrize("spelling", ["./org/other", "../org/other", "~/org/other", "/org/other", Path("org/other")])
def test_what_looks_like_a_path_never_asks_the_hub(folder: Path, spelling: str | Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        resolve(spelling)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="is a file") as caught:
        resolve(folder / "model.safetensors")
    assert str(folder) in caught.value.hint


@pytest.mark.parametrize("name", ["~nouser/x", "/" + "n" * 5000, "n" * 5000, "./a\0b"])
def test_a_name_that_no_folder_can_have(folder: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no folder") as caught:
        resolve(name)
    assert caught.value.hint
    assert len(caught.value.message) < 300


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(folder: Path) -> None:
    folder.chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot read .*model: Permission denied") as caught:
        resolve(folder)
    folder.chmod(0o700)
    assert "permissions" in caught.value.hint


def test_a_local_folder_is_resolved_and_read_without_network_or_huggingface_hub(folder: Path) -> None:
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    script = (
        "import socket, sys\n"
        "def refuse(*arguments): raise SystemExit('tried to reach the network')\n"
        "socket.socket = refuse\n"
        "from ernie45.checkpoint.resolve import resolve\n"
        "from ernie45.checkpoint.headers import read_headers\n"
        "assert list(read_headers(resolve('org/model')).tensors) == ['w']\n"
        "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    out = torch.zeros(3)
    TensorReader(read_headers(resolve("org/model")), PtLayout()).read_into(out, {"w": 3})
    assert out.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["ernie45/tiny-dense", "tiny-dense", "Tiny-Dense"])
def test_built_in_names_resolve_to_the_packaged_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(catalogue, "built_in_folder", lambda entry: tmp_path / entry.short_name)
    (tmp_path / "tiny-dense").mkdir()
    assert resolve(name) == tmp_path / "tiny-dense"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("tiny-dens", "ernie45/tiny-dense"),
        ("ERNIE-4.5-0.3B", "baidu/ERNIE-4.5-0.3B-PT"),
        ("gpt2", "org/name"),
    ],
)
def test_an_unknown_short_name_gets_a_suggestion(folder: Path, name: str, suggestion: str) -> None:
    with pytest.raises(ModelNotFoundError, match=repr(name)) as caught:
        resolve(name)
    assert suggestion in caught.value.hint


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        resolve(" ")
