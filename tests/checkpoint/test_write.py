"""Plans are made from headers; files go on where a mark was set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint import write
from ernie45.checkpoint.headers import CheckpointIndex, read_file_headers, read_headers
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.packing import Step, UnitReader
from ernie45.checkpoint.read import TensorReader
from ernie45.checkpoint.write import (
    START,
    AppendedFile,
    Shard,
    append_shard,
    index_json,
    plan_shards,
    plan_units,
    write_file,
)
from ernie45.errors import CorruptFileError

TENSORS = {
    "model.layers.10.mlp.down_proj.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "model.layers.2.self_attn.v_proj.weight": torch.arange(3, dtype=torch.bfloat16).view(1, 3),
    "model.layers.2.self_attn.k_proj.weight": torch.arange(3, dtype=torch.bfloat16).view(1, 3) + 3,
    "model.layers.2.self_attn.q_proj.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3) + 6,
    "model.layers.2.mlp.gate.weight": torch.arange(9, dtype=torch.float32).view(3, 3),
    "model.embed_tokens.weight": torch.arange(15, dtype=torch.bfloat16).view(5, 3),
}


@pytest.fixture
def index(tmp_path: Path) -> CheckpointIndex:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return read_headers(tmp_path)


def shards_of(index: CheckpointIndex, max_shard_bytes: int) -> tuple[Shard, ...]:
    units = plan_units(index, PtLayout(), index.tensors, PtLayout())
    return plan_shards([(unit,) for unit in units], max_shard_bytes)


def reader_of(shard: Shard, index: CheckpointIndex) -> UnitReader:
    steps = [Step(units=(unit,)) for unit in shard.units]
    return UnitReader(TensorReader(index, PtLayout()), steps)


def write_shard(path: Path, shard: Shard, index: CheckpointIndex) -> None:
    with AppendedFile(path, START) as file:
        for _ in append_shard(file, shard, reader_of(shard, index), lambda num: None):
            pass


def test_units_are_in_the_model_s_order(index: CheckpointIndex) -> None:
    units = plan_units(index, PtLayout(), index.tensors, PtLayout())
    assert [list(unit.rows) for unit in units] == [
        ["model.embed_tokens.weight"],
        ["model.layers.2.mlp.gate.weight"],
        [f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkv"],
        ["model.layers.10.mlp.down_proj.weight"],
    ]
    assert units[2].rows["model.layers.2.self_attn.q_proj.weight"] == 2
    assert (units[2].shape, units[2].dtype, units[2].num_bytes) == ((4, 3), "BF16", 24)


def test_parts_of_another_dtype_are_read_by_themselves(tmp_path: Path) -> None:
    odd = {**TENSORS, "model.layers.2.self_attn.k_proj.weight": torch.ones(1, 3)}
    save_file(odd, tmp_path / "model.safetensors")
    index = read_headers(tmp_path)
    parts = [set(unit.rows) for unit in plan_units(index, PtLayout(), index.tensors, PtLayout())]
    assert {"model.layers.2.self_attn.k_proj.weight"} in parts
    (shard,) = shards_of(index, 10**9)
    write_shard(tmp_path / "out.safetensors", shard, index)
    assert_equal(load_file(tmp_path / "out.safetensors"), odd)


def test_the_routers_of_two_banks_are_written_the_other_way_round(index: CheckpointIndex, tmp_path: Path) -> None:
    gate = "model.layers.2.mlp.gate.weight"
    units = plan_units(index, PtLayout(), index.tensors, PtLayout(has_two_banks=True))
    assert [unit.transposed for unit in units if gate in unit.rows] == [True]
    assert sum(unit.transposed for unit in units) == 1
    (shard,) = plan_shards([units], 10**9)
    write_shard(tmp_path / "out.safetensors", shard, index)
    assert_equal(load_file(tmp_path / "out.safetensors"), {**TENSORS, gate: TENSORS[gate].T})


def test_one_file_is_what_safetensors_reads(index: CheckpointIndex, tmp_path: Path) -> None:
    (shard,) = shards_of(index, 10**9)
    assert shard.file_name == "model.safetensors"
    assert index_json([shard]) is None
    path = tmp_path / "out.safetensors"
    write_shard(path, shard, index)
    assert path.stat().st_size == shard.num_bytes == len(shard.header) + index.total_bytes
    assert_equal(load_file(path), TENSORS)
    written = read_file_headers(path)
    assert dict(written.metadata) == {"format": "pt"}
    assert all(info.start % (4 if info.dtype == "F32" else 2) == 0 for info in written.tensors.values())
    assert len(shard.header) % 8 == 0


def test_files_fill_in_order_up_to_the_limit(index: CheckpointIndex) -> None:
    shards = shards_of(index, 66)
    assert [shard.file_name for shard in shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [shard.tensor_bytes for shard in shards] == [66, 36]
    content = json.loads(index_json(shards) or b"")
    assert content["metadata"] == {"total_size": index.total_bytes}
    assert content["weight_map"].keys() == TENSORS.keys()
    assert content["weight_map"]["model.layers.2.self_attn.v_proj.weight"] == "model-00002-of-00002.safetensors"
    assert [len(shard.units) for shard in shards_of(index, 1)] == [1, 1, 1, 1]


def test_the_source_s_order_does_not_matter(index: CheckpointIndex) -> None:
    turned = CheckpointIndex(
        folder=index.folder,
        tensors=MappingProxyType(dict(reversed(list(index.tensors.items())))),
        metadata=MappingProxyType({"format": "np"}),
    )
    assert shards_of(turned, 66) == shards_of(index, 66)


def test_a_file_goes_on_after_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with AppendedFile(path, START) as file:
        file.append(b"first ")
        mark = file.sync()
        file.append(b"lost")
    assert (mark.num_bytes, mark.sha256) == (6, hashlib.sha256(b"first ").hexdigest())
    with AppendedFile(path, mark) as file:
        file.append(b"second")
        assert file.sync().sha256 == hashlib.sha256(b"first second").hexdigest()
    assert path.read_bytes() == b"first second"


@pytest.mark.parametrize("found", [b"First ", b"firs", b""])
def test_other_bytes_than_marked_are_an_error(tmp_path: Path, found: bytes) -> None:
    path = tmp_path / "file"
    with AppendedFile(path, START) as file:
        file.append(b"first ")
        mark = file.sync()
    path.write_bytes(found)
    with pytest.raises(CorruptFileError, match="the first 6 bytes"):
        AppendedFile(path, mark)
    assert path.read_bytes() == found


def test_a_shard_goes_on_unit_by_unit(index: CheckpointIndex, tmp_path: Path) -> None:
    (shard,) = shards_of(index, 10**9)
    write_shard(tmp_path / "whole", shard, index)
    path = tmp_path / "cut"
    reader = reader_of(shard, index)
    with AppendedFile(path, START) as file:
        appended: list[int] = []
        for num_bytes in append_shard(file, shard, reader, appended.append):
            assert num_bytes == appended[-1]
            if len(appended) == 3:
                break
        mark = file.sync()
    with AppendedFile(path, mark) as file:
        rest = list(append_shard(file, shard, reader, lambda num: None))
    assert sum(appended) + sum(rest) == shard.num_bytes
    assert len(appended) + len(rest) == 1 + len(shard.units)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_system_that_writes_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: whole(descriptor, data[:3], position))
    write_file(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "file", b"old")

    def fail(descriptor: int, data: bytes | memoryview, position: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_at", fail)
        with pytest.raises(OSError, match="No space"):
            write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    write_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
