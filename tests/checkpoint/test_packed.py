"""Reading packed folders: matrices are the files' pages, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ernie45.checkpoint.headers import read_headers, read_json
from ernie45.checkpoint.open import open_source, open_survey, read_config
from ernie45.checkpoint.packed import PackedCheckpointSource, packed_name
from ernie45.checkpoint.read import PackedSource
from ernie45.errors import ConfigError, CorruptFileError, ErnieError, TensorError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.quantization.packed import PackedInt8
from ernie45.quantization.panels import PanelInt4, StoredMatrix
from ernie45.saving import save_checkpoint
from tests.packed_files import change_tensors, check_refused, opened, source_of
from tests.paddle_files import CONFIG, random_pt, write_checkpoint

WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}
CPU, META = torch.device("cpu"), torch.device("meta")
QKV = {f"model.layers.0.self_attn.{name}_proj": rows for name, rows in (("q", 64), ("k", 32), ("v", 32))}
QKV_NAME = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", random_pt(WIDE), WIDE, layout="pt", dtype="BF16")
    save_checkpoint(source, tmp_path / "packed", PRESETS["int4"], progress=False)
    return tmp_path / "packed"


def change(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Replace tensors of the matrix QKV_NAME by the ends of their names, or take them away."""
    change_tensors(folder, {f"{QKV_NAME}.{leaf}": tensor for leaf, tensor in tensors.items()})


def test_a_source_is_packed_where_config_says_so(folder: Path, tmp_path: Path) -> None:
    checkpoint = opened(folder)
    assert checkpoint.preset == PRESETS["int4"]
    assert isinstance(open_source(checkpoint), PackedSource)
    assert not isinstance(open_source(opened(tmp_path / "source")), PackedSource)


def test_matrices_come_as_they_are_stored(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    advanced: list[int] = []
    source = source_of(folder, advance=advanced.append)
    pieces = source.read_packed(QKV, 64, CPU)
    assert pieces is not None
    (packed,) = pieces
    assert isinstance(packed, PanelInt4)
    assert (packed.out_features, packed.in_features) == (128, 64)
    for leaf, tensor in packed.tensors().items():
        assert torch.equal(tensor, stored[f"{QKV_NAME}.{leaf}"])
    assert advanced == [stored_bytes(packed)]
    head = source.read_packed({"lm_head": 50}, 64, CPU)
    assert head is not None
    assert isinstance(head[0], PackedInt8)
    norm = torch.empty(64)
    source.read_into(norm, {"model.norm.weight": 64})
    assert torch.equal(norm, stored["model.norm.weight"].float())


def stored_bytes(matrix: StoredMatrix) -> int:
    return sum(tensor.nbytes for tensor in matrix.tensors().values())


def test_rows_that_fill_no_panel_are_left_out(folder: Path) -> None:
    gate_up = {f"model.layers.1.mlp.{name}_proj": 96 for name in ("gate", "up")}
    pieces = source_of(folder).read_packed({"model.layers.1.mlp.down_proj": 64}, 96, CPU)
    joined = source_of(folder).read_packed(gate_up, 64, CPU)
    assert pieces is not None
    assert joined is not None
    assert [(piece.out_features, piece.in_features) for piece in (*pieces, *joined)] == [(64, 96), (192, 64)]


def test_an_output_head_of_its_own_is_there_though_packed(folder: Path) -> None:
    source = source_of(folder)
    assert "lm_head.weight" in source
    assert "lm_head.bias" not in source
    assert "model.norm.weight" in source


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_matrices_are_mapped_and_their_pages_given_back(tmp_path: Path) -> None:
    config = {**WIDE, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1}
    source = write_checkpoint(tmp_path / "source", random_pt(config), config, layout="pt")
    for name in ("int4", "int8"):
        folder = tmp_path / name
        preset = QuantPreset(name=name, linear=PRESETS[name].linear)
        save_checkpoint(source, folder, preset, progress=False)
        packed_source = source_of(folder)
        gate_up = {f"model.layers.0.mlp.{part}_proj": 4096 for part in ("gate", "up")}
        matrix = packed_source.read_packed(gate_up, 1024, CPU)
        assert matrix is not None
        codes = next(iter(matrix[0].tensors().values()))
        before = codes.clone()
        assert _mapped_bytes(folder) >= codes.nbytes
        packed_source.read_packed({"model.layers.0.self_attn.o_proj": 1024}, 64, CPU)
        assert _mapped_bytes(folder) < 0.3 * stored_bytes(matrix[0])
        # Given back is not taken away: the values are still those of the file.
        assert torch.equal(codes, before)


def _mapped_bytes(folder: Path) -> int:
    """Resident bytes of the mapping of a folder's weights."""
    path, inside = str((folder / "model.safetensors").resolve()), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(path)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} is not mapped")


def test_a_survey_counts_and_leaves_nothing_over(folder: Path) -> None:
    checkpoint = opened(folder)
    source, survey = open_survey(checkpoint)
    assert isinstance(source, PackedCheckpointSource)
    pieces = source.read_packed(QKV, 64, META)
    assert pieces is not None
    assert {tensor.device.type for tensor in pieces[0].tensors().values()} == {"meta"}
    assert survey.read_bytes == stored_bytes(pieces[0])
    assert f"{QKV_NAME}.panels" not in survey.unread()
    with pytest.raises(TensorError, match=r"'lm_head\.codes' that a model of this config has no place for"):
        checkpoint.account_for(["lm_head.codes"])


DAMAGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no panels": ({"panels": None}, r"no matrix '.*qkv_proj', but by config\.json it is packed as 'int4'"),
    "no row scales": ({"row_scales": None}, r"no tensor '.*qkv_proj\.row_scales'"),
    "other rows": (
        {"panels": torch.zeros(1, 9, 64, 4, dtype=torch.uint8)},
        r"qkv_proj\.panels' is stored as U8 \[1, 9, 64, 4\], but the model needs U8 \[2, 9, 64, 4\]",
    ),
    "other columns": ({"panels": torch.zeros(2, 13, 64, 4, dtype=torch.uint8)}, r"needs U8 \[2, 9, 64, 4\]"),
    "panels as one row": ({"panels": torch.zeros(2 * 9 * 64 * 4, dtype=torch.uint8)}, r"U8 \[4608\], but"),
    "another dtype": ({"panels": torch.zeros(2, 9, 64, 4, dtype=torch.int8)}, r"stored as I8 .* needs U8 \[2, 9, 64"),
    "row scales of fewer rows": ({"row_scales": torch.zeros(100)}, r"stored as F32 \[100\], .* needs F32 \[128\]"),
    "row scales in float64": ({"row_scales": torch.zeros(128, dtype=torch.float64)}, "stored as F64 .* needs F32"),
}


@pytest.mark.parametrize(("tensors", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_what_does_not_fit_is_named(
    folder: Path, tensors: dict[str, torch.Tensor | None], message: str, device: torch.device
) -> None:
    change(folder, tensors)
    check_refused(folder, QKV, 64, device, message)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_row_scales_that_are_not_finite_are_refused(folder: Path, wrong: float) -> None:
    row_scales = torch.ones(128)
    row_scales[77] = wrong
    change(folder, {"row_scales": row_scales})
    with pytest.raises(TensorError, match=r"qkv_proj\.row_scales' holds 1 values that are not finite"):
        source_of(folder).read_packed(QKV, 64, CPU)


def test_what_a_matrix_has_twice_is_left_over(folder: Path) -> None:
    change(folder, {"codes": torch.zeros(128, 32, dtype=torch.uint8)})
    checkpoint = opened(folder)
    source, survey = open_survey(checkpoint)
    assert isinstance(source, PackedSource)
    source.read_packed(QKV, 64, META)
    assert f"{QKV_NAME}.codes" in survey.unread()


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_what_is_looked_up_by_row_is_never_in_panels(folder: Path, name: str) -> None:
    panels = {f"{name}.panels": torch.zeros(1, 9, 64, 4, dtype=torch.uint8), f"{name}.row_scales": torch.zeros(64)}
    change_tensors(folder, {**panels, f"{name}.codes": None, f"{name}.scales": None})
    with pytest.raises(TensorError, match=rf"no tensor '{name}\.codes'"):
        source_of(folder).read_packed({name: 50}, 64, CPU)


def test_columns_that_are_no_whole_groups_are_never_in_panels(folder: Path) -> None:
    with pytest.raises(TensorError, match=r"no tensor '.*qkv_proj\.codes'"):
        source_of(folder).read_packed(QKV, 68, CPU)


def test_the_embedding_is_never_of_4_bits(folder: Path) -> None:
    change_tensors(folder, {"lm_head.codes": torch.zeros(50, 32, dtype=torch.uint8)})
    with pytest.raises(TensorError, match=r"lm_head\.codes' is stored as U8 \[50, 32\], but the model needs I8"):
        source_of(folder).read_packed({"lm_head": 50}, 64, CPU)


def test_a_file_that_shrank_after_its_header_was_read(folder: Path) -> None:
    source = source_of(folder)
    path = folder / "model.safetensors"
    start = read_headers(folder).tensors[f"{QKV_NAME}.panels"].start
    with path.open("r+b") as file:
        file.truncate(start + 10)
    with pytest.raises(CorruptFileError, match=rf"cut short inside tensor .* it has {start + 10}"):
        source.read_packed(QKV, 64, CPU)
    with pytest.raises(CorruptFileError, match="cut short"):
        opened(folder)


ENTRIES: dict[str, tuple[dict[str, Any], type[ErnieError], str]] = {
    "newer": ({"format_version": 3}, UnsupportedError, "written by a newer version of ernie45: its packed format is 3"),
    "no version": ({"format_version": None}, ConfigError, "format_version is None"),
    "a version in text": ({"format_version": "1"}, ConfigError, "format_version is '1'"),
    "no preset": ({"preset": None}, ConfigError, "preset is None"),
    "other parts": ({"preset": {"name": "int4"}}, ConfigError, "preset is {'name': 'int4'}"),
    "bitsandbytes": (
        {"preset": {"name": "nf4", "experts": "nf4", "linear": None, "embedding": None}},
        ConfigError,
        "preset is .*'experts': 'nf4'",
    ),
    "a list": ({"preset": {"name": "x", "experts": [], "linear": None, "embedding": None}}, ConfigError, "preset is"),
    "embedding": (
        {"preset": {"name": "x", "experts": None, "linear": None, "embedding": "int4"}},
        ConfigError,
        "embedding='int4' is unknown",
    ),
}


@pytest.mark.parametrize(("entries", "error", "message"), ENTRIES.values(), ids=ENTRIES)
def test_config_entries_of_another_version(
    folder: Path, entries: dict[str, Any], error: type[ErnieError], message: str
) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        read_config(folder)


def test_names_of_joined_matrices() -> None:
    assert packed_name(["a.b.q_proj", "a.b.k_proj", "a.b.v_proj"]) == "a.b.qkv_proj"
    assert packed_name(["a.b.gate_proj", "a.b.up_proj"]) == "a.b.gate_up_proj"
    assert packed_name(["a.b.o_proj"]) == "a.b.o_proj"
    assert packed_name(["lm_head"]) == "lm_head"
    assert packed_name(["a.left", "a.right"]) == "a.left_right"
