"""The tensors of an expert are taken from what was staged of it, and matrices in panels lie where they are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45.checkpoint.expert_reads import ExpertReader, expert_readers
from ernie45.checkpoint.large_pages import map_large_pages
from ernie45.checkpoint.open import Checkpoint, expert_tensors, open_source
from ernie45.checkpoint.read import PackedSource, TensorSource, bytes_of
from ernie45.checkpoint.staged_reads import BLOCK_BYTES, StagedReader
from ernie45.errors import CheckpointError, CorruptFileError
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from tests.gptq_files import write_gptq_folder
from tests.packed_files import as_version_1, move_data, opened
from tests.paddle_files import CONFIG, EXPERTS, FileLayout, FloatDtype, random_pt, write_checkpoint

CPU = torch.device("cpu")
WIDE: dict[str, Any] = {**CONFIG, **EXPERTS, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
EXPERT = "model.layers.2.mlp.experts.3."
GATE_UP = {f"{EXPERT}gate_proj": 32, f"{EXPERT}up_proj": 32}
DOWN = {f"{EXPERT}down_proj": 64}


def packed_folder(tmp_path: Path, preset: str = "int4", *, expert_biases: bool = False) -> Path:
    tensors = random_pt(WIDE, expert_biases=expert_biases)
    plain = write_checkpoint(tmp_path / "plain", tensors, WIDE, layout="pt", dtype="BF16")
    save_checkpoint(plain, tmp_path / "packed", PRESETS[preset], progress=False)
    return tmp_path / "packed"


def staged_and_moved(checkpoint: Checkpoint) -> TensorSource:
    """A source whose reader has staged EXPERT, while the files are now somewhere else: who wants another byte fails."""
    reader = StagedReader()
    source = open_source(checkpoint, reader=reader)
    reader.stage(expert_tensors(checkpoint)[EXPERT])
    checkpoint.folder.rename(checkpoint.folder.with_name("moved"))
    return source


@pytest.mark.parametrize("layout", ["pt", "paddle", "paddleformers"])
@pytest.mark.parametrize("has_biases", [False, True])
def test_an_expert_is_read_from_what_is_staged(tmp_path: Path, layout: FileLayout, has_biases: bool) -> None:
    tensors = random_pt(WIDE, expert_biases=has_biases)
    dtype: FloatDtype = "BF16" if layout == "pt" else "U16"
    folder = write_checkpoint(tmp_path / "model", tensors, WIDE, layout=layout, dtype=dtype, num_shards=3)
    source = staged_and_moved(opened(folder))
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("weight", "bias")[: 1 + has_biases]:
            stored = torch.from_numpy(tensors[f"{EXPERT}{leaf}.{kind}"])
            out = torch.empty(stored.shape, dtype=torch.bfloat16)
            source.read_into(out, {f"{EXPERT}{leaf}.{kind}": len(out)})
            assert torch.equal(out.float(), stored)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("preset", ["int4", "int8"])
def test_a_packed_expert_lies_in_what_is_staged(tmp_path: Path, preset: str, version: int) -> None:
    folder = packed_folder(tmp_path, preset)
    assert_packed_as_without_reader(opened(as_version_1(folder, tmp_path / "old") if version == 1 else folder))


def test_a_gptq_expert_is_read_from_what_is_staged(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt")
    write_gptq_folder(plain, tmp_path / "gptq", tmp_path / "reference")
    assert_packed_as_without_reader(opened(tmp_path / "gptq"))


def assert_packed_as_without_reader(checkpoint: Checkpoint) -> None:
    without = open_source(checkpoint)
    assert isinstance(without, PackedSource)
    expected = [without.read_packed(GATE_UP, 64, CPU), without.read_packed(DOWN, 32, CPU)]
    source = staged_and_moved(checkpoint)
    assert isinstance(source, PackedSource)
    for wanted, found in zip(
        expected, (source.read_packed(GATE_UP, 64, CPU), source.read_packed(DOWN, 32, CPU)), strict=True
    ):
        assert wanted is not None
        assert found is not None
        for one, other in zip(wanted, found, strict=True):
            assert one.tensors().keys() == other.tensors().keys()
            for leaf, tensor in one.tensors().items():
                assert torch.equal(tensor, other.tensors()[leaf])


def test_packed_matrices_are_not_mapped_with_a_reader(tmp_path: Path) -> None:
    checkpoint = opened(packed_folder(tmp_path))
    reader = StagedReader()
    source = open_source(checkpoint, reader=reader)
    assert isinstance(source, PackedSource)
    reader.stage(expert_tensors(checkpoint)[EXPERT])
    staged = source.read_packed(DOWN, 32, CPU)
    assert staged is not None
    view = reader.view(checkpoint.index.tensors[f"{EXPERT}down_proj.panels"])
    assert view is not None
    assert staged[0].tensors()["panels"].data_ptr() == torch.frombuffer(view, dtype=torch.uint8).data_ptr()

    without = open_source(checkpoint)
    assert isinstance(without, PackedSource)
    other = {name.replace("experts.3", "experts.0"): rows for name, rows in DOWN.items()}
    not_staged, expected = source.read_packed(other, 32, CPU), without.read_packed(other, 32, CPU)
    assert not_staged is not None
    assert expected is not None
    for leaf, tensor in expected[0].tensors().items():
        assert torch.equal(tensor, not_staged[0].tensors()[leaf])
    (tmp_path / "packed").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="No such file"):
        source.read_packed(other, 32, CPU)


@pytest.mark.parametrize("layout", ["pt", "paddle", "paddleformers"])
def test_the_tensors_of_each_expert_are_found(tmp_path: Path, layout: FileLayout) -> None:
    folder = write_checkpoint(tmp_path, random_pt(WIDE, expert_biases=True), WIDE, layout=layout)
    checkpoint = opened(folder)
    experts = expert_tensors(checkpoint)
    assert set(experts) == {f"model.layers.{layer}.mlp.experts.{number}." for layer in (1, 2) for number in range(4)}
    for prefix, infos in experts.items():
        wanted = {
            checkpoint.layout.locate(f"{prefix}{leaf}.{kind}").key
            for leaf in ("gate_proj", "up_proj", "down_proj")
            for kind in ("weight", "bias")
        }
        assert sorted(info.name for info in infos) == sorted(wanted)


# Straight into a slot


@pytest.fixture
def room() -> torch.Tensor:
    return torch.frombuffer(map_large_pages(8 * BLOCK_BYTES, "for a test"), dtype=torch.uint8)


def lies_in(room: torch.Tensor, tensor: torch.Tensor) -> bool:
    return 0 <= tensor.data_ptr() - room.data_ptr() <= room.nbytes - tensor.nbytes


def matrices(reader: ExpertReader) -> list[torch.Tensor]:
    """The tensors that the expert's matrices are made of."""
    assert isinstance(reader.source, PackedSource)
    stored = [reader.source.read_packed(GATE_UP, 64, CPU), reader.source.read_packed(DOWN, 32, CPU)]
    return [tensor for pieces in stored for piece in pieces or () for tensor in piece.tensors().values()]


@pytest.mark.parametrize("offset", [0, 8, 64, 2048, 4032, 4088])
def test_an_expert_in_panels_lies_in_its_slot_wherever_it_begins_in_its_file(
    tmp_path: Path, room: torch.Tensor, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed_folder(tmp_path)
    expected = [tensor.clone() for tensor in matrices(staged(folder, room=None))]
    first = opened(folder).index.tensors[f"{EXPERT}gate_up_proj.panels"].start
    move_data(folder, (offset - first) % BLOCK_BYTES)
    assert opened(folder).index.tensors[f"{EXPERT}gate_up_proj.panels"].start % BLOCK_BYTES == offset
    monkeypatch.setattr("ernie45.checkpoint.staged_reads.map_large_pages", lambda *wanted: pytest.fail("a buffer"))
    found = matrices(staged(folder, room))
    assert len(found) == 4
    assert all(lies_in(room, tensor) for tensor in found)
    assert found[0].data_ptr() - room.data_ptr() == offset
    assert all(torch.equal(tensor, other) for tensor, other in zip(found, expected, strict=True))


def staged(folder: Path, room: torch.Tensor | None) -> ExpertReader:
    """A reader that has the expert, in `room` if that is given."""
    reader = expert_readers(opened(folder), None)()
    reader.stage(EXPERT, None if room is None else bytes_of(room))
    return reader


def test_a_room_too_small_for_its_blocks_is_left_alone(tmp_path: Path, room: torch.Tensor) -> None:
    folder = packed_folder(tmp_path)
    expected = [tensor.clone() for tensor in matrices(staged(folder, room))]
    room.zero_()
    found = matrices(staged(folder, room[: sum(tensor.nbytes for tensor in expected) - 1]))
    assert not any(lies_in(room, tensor) for tensor in found)
    assert not room.any()
    assert all(torch.equal(tensor, other) for tensor, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["int8", "version 1", "GPTQ"])
def test_what_is_stored_otherwise_is_staged_beside_the_slot(tmp_path: Path, room: torch.Tensor, kind: str) -> None:
    folder = packed_folder(tmp_path, "int8" if kind == "int8" else "int4")
    if kind == "version 1":
        folder = as_version_1(folder, tmp_path / "old")
    if kind == "GPTQ":
        plain, folder = write_checkpoint(tmp_path / "float32", random_pt(WIDE), WIDE, layout="pt"), tmp_path / "gptq"
        write_gptq_folder(plain, folder, tmp_path / "reference")
    assert not any(lies_in(room, tensor) for tensor in matrices(staged(folder, room)))
    assert not room.any()


@pytest.mark.parametrize("kind", ["plain", "biases"])
def test_so_is_what_has_tensors_beside_panels(tmp_path: Path, room: torch.Tensor, kind: str) -> None:
    folder = packed_folder(tmp_path, expert_biases=kind == "biases")
    reader = staged(tmp_path / "plain" if kind == "plain" else folder, room)
    name = f"{EXPERT}down_proj.{'weight' if kind == 'plain' else 'bias'}"
    out = torch.empty((64, 32)[: 1 + (kind == "plain")])
    reader.source.read_into(out, {name: 64})
    assert out.isfinite().all()
    assert not room.any()


def test_a_file_that_is_cut_short_and_whole_again(tmp_path: Path, room: torch.Tensor) -> None:
    folder = packed_folder(tmp_path)
    reader = staged(folder, room)
    expected = [tensor.clone() for tensor in matrices(reader)]
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: opened(folder).index.tensors[f"{EXPERT}down_proj.panels"].start + 100])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is cut short"):
        reader.stage(EXPERT, bytes_of(room))
    file.write_bytes(content)
    reader.stage(EXPERT, bytes_of(room))
    found = matrices(reader)
    assert all(
        lies_in(room, tensor) and torch.equal(tensor, other) for tensor, other in zip(found, expected, strict=True)
    )
