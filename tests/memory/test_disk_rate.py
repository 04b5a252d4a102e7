from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.memory.disk_rate import disk_rate
from ernie45.memory.streaming import NOMINAL_DISK_RATE
from ernie45.memory.workspace import NUM_EXPERT_READERS


def write(folder: Path, shapes: dict[str, int]) -> Path:
    tensors = {name: np.zeros(num_bytes, np.uint8) for name, num_bytes in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def experts(layer: int, num_bytes: int) -> dict[str, int]:
    leaves = ("gate_up_proj.codes", "down_proj.codes", "down_proj.scales")
    return {f"model.layers.{layer}.mlp.experts.{n}.{leaf}": num_bytes for n in range(2) for leaf in leaves}


def test_whole_experts_are_read_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread takes 10 ms for an expert, all of them at once."""
    folder = write(tmp_path, {**experts(1, 1000), **experts(12, 1000), "model.norm.weight": 4})
    read: list[Sequence[TensorInfo]] = []
    threads: set[int] = set()
    real = StagedReader.stage

    def stage(reader: StagedReader, infos: Sequence[TensorInfo]) -> None:
        real(reader, infos)
        time.sleep(0.01)
        threads.add(threading.get_ident())
        read.append(infos)

    monkeypatch.setattr(StagedReader, "stage", stage)
    rate = disk_rate(folder)
    assert len(threads) == NUM_EXPERT_READERS
    assert {len({info.name.rpartition("_proj")[0].rpartition(".")[0] for info in infos}) for infos in read} == {1}
    assert {sum(info.num_bytes for info in infos) for infos in read} == {3000}
    assert len({infos[0].name for infos in read}) == 4
    assert 0.1 * NUM_EXPERT_READERS * 3000 / 0.01 < rate <= NUM_EXPERT_READERS * 3000 / 0.01
    assert disk_rate(folder) == rate, "measured once"


def test_of_a_large_expert_a_piece_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie45.memory.disk_rate._PIECE_BYTES", 5000)
    monkeypatch.setattr("ernie45.memory.disk_rate._READ_SECONDS", 0)
    num_bytes: list[int] = []
    real = StagedReader.stage

    def stage(reader: StagedReader, infos: Sequence[TensorInfo]) -> None:
        num_bytes.extend(info.num_bytes for info in infos)
        real(reader, infos)

    monkeypatch.setattr(StagedReader, "stage", stage)
    assert disk_rate(write(tmp_path, experts(0, 10_000))) > 0
    assert num_bytes == [5000] * NUM_EXPERT_READERS


def test_without_experts_it_is_nominal(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert disk_rate(make_checkpoint(tmp_path)) == NOMINAL_DISK_RATE


def test_torch_stays_out(tmp_path: Path) -> None:
    folder = write(tmp_path, experts(0, 1000))
    program = (
        "import sys; from pathlib import Path; from ernie45.memory.disk_rate import disk_rate; "
        "assert disk_rate(Path(sys.argv[1])) > 0; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
