"""Saving that fails, or is given up, leaves nothing behind and the source as it was."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from ernie45.checkpoint import write
from ernie45.checkpoint.open import open_checkpoint, read_config
from ernie45.checkpoint.origin import Origin
from ernie45.errors import CheckpointError, InvalidRequestError, UnsupportedError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint, save_loaded
from ernie45.spec import parse_spec
from tests.full_disk import fill_disk_after
from tests.paddle_files import CONFIG, random_pt, write_checkpoint

INT4 = PRESETS["int4"]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "source", random_pt(CONFIG), CONFIG, layout="pt", dtype="BF16", num_shards=2)
    (folder / "generation_config.json").write_text("{}")
    return folder


def test_a_disk_without_room_is_told_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1234))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but its disk has 1,234 free"):
        save_checkpoint(source, tmp_path / "out", INT4, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_shard_bytes", [5000, 10**9])
def test_a_disk_that_fills_up_is_an_error_of_ours(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_bytes: int
) -> None:
    before = content(source)
    fill_disk_after(8000, monkeypatch)
    with pytest.raises(CheckpointError, match=r"the disk is full: .*out could not be finished") as caught:
        save_checkpoint(source, tmp_path / "out", INT4, max_shard_bytes=max_shard_bytes, progress=False)
    assert "what was written is removed" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert content(source) == before


def test_a_folder_that_was_there_stays_empty(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_file(path: Path, content: bytes) -> None:
        if path.name == "config.json":  # after everything else
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        whole(path, content)

    whole = write.write_file
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("ernie45.checkpoint.packing.write_file", write_file)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save_checkpoint(source, tmp_path / "out", INT4, progress=False)
    assert content(tmp_path / "out") == {}
    save_checkpoint(source, tmp_path / "out", INT4, progress=False)
    assert not list((tmp_path / "out").glob("*.partial"))


LIMITED = """
import resource, sys
from pathlib import Path
from ernie45.errors import CheckpointError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    save_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), PRESETS["int4"], progress=False)
except CheckpointError as error:
    print(error)
"""


def test_a_limit_of_the_system_is_an_error_of_ours(source: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"{tmp_path / 'out'} could not be written: [Errno {errno.EFBIG}]" in run.stdout
    assert not (tmp_path / "out").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 8000


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(source)
    written: list[int] = []

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        written.append(position)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGINT)  # reaches the main thread, which waits for this one
            time.sleep(0.2)
        return whole(descriptor, data, position)

    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    # A run that a shell started in the background ignores SIGINT from the start, and Python leaves it so.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(source, tmp_path / "new" / "inner" / "out", INT4, progress=False)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert len(written) == 5
    assert not (tmp_path / "new").exists()
    assert content(source) == before


def test_a_folder_with_files_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequestError, match=r"is not empty: it holds notes\.txt"):
        save_checkpoint(source, tmp_path / "full", INT4, progress=False)
    assert content(tmp_path / "full") == {"notes.txt": b"mine"}
    for folder in (source, source / "inner"):
        with pytest.raises(InvalidRequestError, match="lies in the source"):
            save_checkpoint(source, folder, INT4, progress=False)
    with pytest.raises(InvalidRequestError, match="is a file"):
        save_checkpoint(source, tmp_path / "full" / "notes.txt", INT4, progress=False)


@pytest.mark.parametrize("folder", [None, 5, b"out", "", " ", "~nouser/out", "a\0b"])
def test_a_name_of_no_folder_is_refused(small_model: ErnieModel, folder: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"names no folder|home folder of a user") as caught:
        small_model.save_pretrained(folder)
    assert caught.value.hint


@pytest.mark.parametrize("parent", [".", "new"])
def test_a_name_that_is_too_long_is_an_error_of_ours(small_model: ErnieModel, tmp_path: Path, parent: str) -> None:
    with pytest.raises(CheckpointError, match="File name too long") as caught:
        small_model.save_pretrained(tmp_path / parent / ("x" * 300))
    assert "check its name and rights" in caught.value.hint
    assert not (tmp_path / "new").exists()


WITHOUT_RIGHTS = """
import os, sys
from pathlib import Path
from ernie45.errors import CheckpointError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
source, closed = map(Path, sys.argv[1:])
closed.chmod(0)
if os.geteuid() == 0:
    import ctypes
    # Root passes over rights by two capabilities, which this process gives up: CAP_DAC_OVERRIDE and _READ_SEARCH.
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0
for folder in (closed, closed / "out"):
    try:
        save_checkpoint(source, folder, PRESETS["int4"], progress=False)
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gives up capabilities of Linux")
def test_a_folder_without_rights_is_an_error_of_ours(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, str(source), str(tmp_path / "closed")],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    (tmp_path / "closed").chmod(0o700)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("closed could not be written: [Errno 13]") == 1, run.stdout
    assert run.stdout.count("out could not be written: [Errno 13]") == 1, run.stdout
    assert run.stdout.count("check its name and rights") == 2


def test_a_scripted_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no weights to save"):
        save_loaded(None, tmp_path / "out", progress=False)


def origin_of(folder: Path) -> Origin:
    config = read_config(folder)
    return Origin.of(open_checkpoint(folder, config, parse_spec(config)), INT4, None, torch.bfloat16)


def test_a_source_that_is_gone_or_changed_is_not_saved(source: Path, tmp_path: Path) -> None:
    origin = origin_of(source)
    save_loaded(origin, tmp_path / "first", progress=False)
    path = source / "model-00002-of-00002.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors has changed since the model was loa"):
        save_loaded(origin, tmp_path / "second", progress=False)
    path.unlink()
    with pytest.raises(CheckpointError, match="is not there any more"):
        save_loaded(origin, tmp_path / "second", progress=False)
    assert not (tmp_path / "second").exists()
