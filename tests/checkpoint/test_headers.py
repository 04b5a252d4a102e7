from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45.checkpoint.headers import MAX_HEADER_BYTES, read_headers, read_json, read_weight_map
from ernie45.errors import CheckpointError, ConfigError, CorruptFileError, TensorError

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def write_raw(folder: Path, header: object, data_bytes: int, *, name: str = "model.safetensors") -> Path:
    """Write a safetensors file whose header is given as JSON text or as something to make JSON of."""
    text = header if isinstance(header, str) else json.dumps(header)
    path = folder / name
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(data_bytes))
    return path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(5)}, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(tmp_path, {"a": first, "b": first, "c": second})
    return tmp_path


def test_a_single_file_gives_every_tensor_with_its_place(tmp_path: Path) -> None:
    path = write_raw(tmp_path, {"b": B, "a": A, "__metadata__": {"format": "pt"}}, 32)
    index = read_headers(tmp_path)
    assert list(index.tensors) == ["a", "b"]
    b = index.tensors["b"]
    assert (b.file, b.dtype, b.shape, b.num_bytes) == (path, "BF16", (4,), 8)
    assert b.start == path.stat().st_size - 8
    assert index.metadata == {"format": "pt"}
    assert index.total_bytes == 32


def test_scalars_and_empty_tensors_are_sound(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    tensors = read_headers(tmp_path).tensors
    assert tensors["scalar"].shape == ()
    assert (tensors["empty"].shape, tensors["empty"].num_bytes) == ((0, 4), 0)


def test_shards_are_read_together(sharded: Path) -> None:
    index = read_headers(sharded)
    assert set(index.tensors) == {"a", "b", "c"}
    assert index.tensors["c"].file.name == "model-00002-of-00002.safetensors"
    assert index.metadata == {"format": "pt"}
    assert index.total_bytes == 4 * (6 + 4 + 5)


def test_the_index_wins_over_a_single_file(sharded: Path) -> None:
    save_file({"other": torch.ones(1)}, sharded / "model.safetensors")
    assert "other" not in read_headers(sharded).tensors


BROKEN_HEADERS = {
    "not JSON": ("{", 32, "JSON"),
    "not UTF-8 text": ('{"\udcff"', 32, "JSON"),
    "not an object": ([A], 32, "object"),
    "nested absurdly": ("[" * 100_000, 0, "JSON"),
    "a name twice": ('{"a": 1, "a": 1}', 24, "'a' occurs twice"),
    "a field twice": (
        '{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        0,
        "twice",
    ),
    "metadata that is no object": ({"__metadata__": 3, "a": A}, 24, "__metadata__"),
    "metadata that is not text": ({"__metadata__": {"format": 3}, "a": A}, 24, "__metadata__"),
    "an entry that is no object": ({"a": 3}, 24, "'a'"),
    "an entry with a missing field": ({"a": {"dtype": "F32", "shape": [6]}}, 24, "'a'"),
    "an entry with a further field": ({"a": A | {"more": 1}}, 24, "'a'"),
    "an unknown dtype": ({"a": A | {"dtype": "F31"}}, 24, "'F31'"),
    "a dtype that is a list": ({"a": A | {"dtype": ["F32"]}}, 24, "dtype"),
    "a negative length": ({"a": A | {"shape": [-2, -3]}}, 24, "shape"),
    "a fractional length": ({"a": A | {"shape": [2.0, 3]}}, 24, "shape"),
    "a boolean length": ({"a": A | {"shape": [True, 6]}}, 24, "shape"),
    "too many dimensions": ({"a": A | {"shape": [2, 3] + [1] * 15}}, 24, "shape"),
    "three offsets": ({"a": A | {"data_offsets": [0, 12, 24]}}, 24, "offsets"),
    "offsets that are text": ({"a": A | {"data_offsets": "0-24"}}, 24, "offsets"),
    "offsets the wrong way round": ({"a": A | {"data_offsets": [24, 0]}}, 24, "24"),
    "too few bytes for the shape": ({"a": A | {"data_offsets": [0, 20]}}, 20, "needs 24 bytes"),
    "a gap at the start": ({"b": B}, 32, "gap"),
    "a gap between tensors": ({"a": A, "b": B | {"data_offsets": [28, 36]}}, 36, "gap"),
    "tensors that overlap": ({"a": A, "b": B | {"data_offsets": [20, 28]}}, 28, "overlaps"),
    "bytes after the last tensor": ({"a": A}, 30, "goes on"),
}


@pytest.mark.parametrize(("header", "data_bytes", "message"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_a_broken_header_is_refused(tmp_path: Path, header: Any, data_bytes: int, message: str) -> None:
    if isinstance(header, str):
        content = header.encode(errors="surrogateescape")
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(data_bytes))
    else:
        write_raw(tmp_path, header, data_bytes)
    with pytest.raises(CorruptFileError, match=message) as caught:
        read_headers(tmp_path)
    assert "model.safetensors" in caught.value.message
    assert caught.value.hint


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = write_raw(tmp_path, {"a": A, "b": B}, 32)
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 5)
    with pytest.raises(CorruptFileError, match=f"expected {whole} bytes, it has {whole - 5}"):
        read_headers(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 8, 20])
def test_a_file_cut_inside_its_header_is_refused(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path, {"a": A, "b": B}, 32)
    with path.open("r+b") as file:
        file.truncate(length)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        read_headers(tmp_path)


def test_an_announced_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: long enough, takes no disk
    with pytest.raises(CorruptFileError, match=str(MAX_HEADER_BYTES + 1)):
        read_headers(tmp_path)


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TensorError, match=r"1 of 2 weight files: model-00002-of-00002\.safetensors"):
        read_headers(sharded)


def test_a_shard_without_a_promised_tensor_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(TensorError, match=r"00001-of-00002\.safetensors lacks .*: b"):
        read_headers(sharded)


def test_a_shard_with_an_unlisted_tensor_is_refused(sharded: Path) -> None:
    save_file({"c": torch.ones(5), "stray": torch.ones(5)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(TensorError, match="does not place there: stray"):
        read_headers(sharded)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        3,
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, shard: object) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(CorruptFileError, match="not a plain"):
        read_headers(tmp_path)


def test_an_index_that_names_a_pickle_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CorruptFileError, match=r"pytorch_model\.bin"):
        read_headers(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_without_weights_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CorruptFileError, match="no weight_map"):
        read_weight_map(tmp_path)


def test_the_weight_map_is_none_without_an_index(tmp_path: Path) -> None:
    assert read_weight_map(tmp_path) is None


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_state.pdparams", "model.pt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=f"{name}; pickles can run code and are never opened"):
        read_headers(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(TensorError, match="index"):
        read_headers(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        read_headers(tmp_path)


def test_read_json_gives_the_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 1024, "名": "文心"}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"hidden_size": 1024, "名": "文心"}


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.write_text("{'a': 1}"), id="not JSON"),
        pytest.param(lambda path: path.write_text('{"a": 1, "a": 2}'), id="a key twice"),
        pytest.param(lambda path: path.write_text("[1]"), id="not an object"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe{}"), id="not UTF-8"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
    ],
)
def test_an_unreadable_config_is_a_config_error(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    write_raw(tmp_path, {"a": A}, 24)
    script = (
        "import sys; from pathlib import Path; from ernie45.checkpoint.headers import read_headers; "
        f"assert read_headers(Path({str(tmp_path)!r})).total_bytes == 24; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
