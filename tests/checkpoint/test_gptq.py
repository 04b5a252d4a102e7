from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.gptq import GptqSource
from ernie45.checkpoint.gptq_config import GptqConfig, read_gptq_config, with_quantize_config
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.read import PackedSource, TensorReader
from ernie45.checkpoint.survey import HeaderSurvey
from ernie45.errors import ConfigError, TensorError, UnsupportedError
from ernie45.quantization.packed import dequantize, num_bytes
from tests.gptq_files import write_gptq_folder

CPU, META = torch.device("cpu"), torch.device("meta")
ATTENTION = "model.layers.0.self_attn."
QKV = {ATTENTION + "q_proj": 64, ATTENTION + "k_proj": 32, ATTENTION + "v_proj": 32}
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "tokenizer": False}
PUBLISHED = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": True,
    "sym": True,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "lm_head": False,
    "dynamic": {"-:.*shared_experts.*": {}, "+:.*q_proj": {"bits": 4}},
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
}


def said(**changes: object) -> dict[str, Any]:
    return {"model_type": "ernie4_5", "quantization_config": {**PUBLISHED, **changes}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (128, True, True, True)),
        ({"group_size": -1, "desc_act": False}, (None, True, True, False)),
        ({"checkpoint_format": "gptq_v2", "sym": False, "meta": None}, (128, False, False, True)),
        ({"checkpoint_format": None, "format": "GPTQ_V2", "group_size": 32}, (32, False, True, True)),
        ({"checkpoint_format": None, "sym": None, "desc_act": None, "dynamic": None}, (128, True, True, False)),
        ({"sym": False}, (128, True, False, True)),
        ({"sym": False, "meta": {"quantizer": "gptqmodel:0.9.0"}}, (128, True, False, True)),
    ],
)
def test_configs_that_can_be_read(changes: dict[str, object], expected: tuple[int | None, bool, bool, bool]) -> None:
    group_size, stores_zero_minus_one, is_symmetric, reorders_inputs = expected
    assert read_gptq_config(said(**changes)) == GptqConfig(
        group_size=group_size,
        stores_zero_minus_one=stores_zero_minus_one,
        is_symmetric=is_symmetric,
        reorders_inputs=reorders_inputs,
    )


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": "int4"}, said(quant_method="awq")]
)
def test_configs_of_no_gptq_weights(config: dict[str, Any]) -> None:
    assert read_gptq_config(config) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 8}, "bits is 8"),
        ({"bits": None}, "bits is None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": None, "format": "bitblas"}, "checkpoint_format is 'bitblas'"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"lm_head": True}, "lm_head is True"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"adapter": {"name": "lora"}}, "adapter is"),
        ({"group_size": 16}, "group_size is 16"),
        ({"dynamic": {".*down_proj": {"bits": 8}}}, "down_proj"),
        ({"dynamic": {"+:.*down_proj": {"group_size": 32}}}, "down_proj"),
        ({"sym": False, "meta": None}, "asymmetric"),
        ({"sym": False, "meta": {"quantizer": ["optimum:1.2", "auto_gptq:0.7"]}}, "asymmetric"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_gptq_config(said(**changes))
    assert text in caught.value.message
    assert "GPTQModel" in caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"group_size": None}, {"group_size": 0}, {"group_size": "128"}, {"sym": "yes"}, {"dynamic": ["a"]}]
)
def test_configs_that_are_wrong(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_gptq_config(said(**changes))


def test_quantize_config_stands_in(tmp_path: Path) -> None:
    plain = {"model_type": "ernie4_5"}
    assert with_quantize_config(plain, tmp_path) == plain
    older = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(older))
    found = read_gptq_config(with_quantize_config(plain, tmp_path))
    assert found is not None
    assert found.group_size == 64
    assert with_quantize_config(said(), tmp_path) == said()


@pytest.fixture
def folders(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a GPTQ folder with these options; returns it, and the folder of what it stands for."""

    def write(**options: Any) -> tuple[Path, Path]:
        source = make_checkpoint(tmp_path / "source", **WIDTHS)
        write_gptq_folder(source, tmp_path / "gptq", tmp_path / "reference", **options)
        return tmp_path / "gptq", tmp_path / "reference"

    return write


def source_of(folder: Path) -> GptqSource:
    index, layout = read_headers(folder), PtLayout()
    config = read_gptq_config(json.loads((folder / "config.json").read_text()))
    assert config is not None
    return GptqSource(TensorReader(index, layout), index, layout, config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": -1},
        {"order": "shared", "symmetric": False},
        {"order": "separate", "version": 2},
        {"version": 2, "symmetric": False},
    ],
)
def test_matrices_are_what_was_written(folders: Callable[..., tuple[Path, Path]], options: dict[str, Any]) -> None:
    folder, reference = folders(**options)
    source, expected = source_of(folder), load_file(reference / "model.safetensors")
    num_read = 0
    for name, values in expected.items():
        module = name.removesuffix(".weight")
        assert source.stored(module) == ("_proj" in name)
        if source.stored(module):
            num_rows, num_columns = values.shape
            assert torch.equal(dequantize(source.read(module, num_rows, num_columns, CPU)), values)
            num_read += 1
    assert num_read == 14


def test_the_rest_is_read_as_ever(folders: Callable[..., tuple[Path, Path]]) -> None:
    folder, reference = folders()
    source, name = source_of(folder), "model.embed_tokens.weight"
    assert isinstance(source, PackedSource)
    assert name in source
    assert ATTENTION + "q_proj.weight" not in source
    out = torch.empty(384, 64)
    source.read_into(out, {name: 384})
    assert torch.equal(out, load_file(reference / "model.safetensors")[name])


@pytest.mark.parametrize(("order", "num_pieces"), [("stored", 1), ("shared", 1), ("separate", 3)])
def test_a_fused_matrix_is_in_one_where_it_can_be(
    folders: Callable[..., tuple[Path, Path]], order: str, num_pieces: int
) -> None:
    folder, reference = folders(order=order)
    pieces = source_of(folder).read_packed(QKV, 64, CPU)
    assert pieces is not None
    assert len(pieces) == num_pieces
    expected = load_file(reference / "model.safetensors")
    values = torch.cat([expected[f"{name}.weight"] for name in QKV])
    assert torch.equal(torch.cat([dequantize(piece) for piece in pieces]), values)


def test_plain_matrices_are_left_to_the_reader(folders: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = folders(plain="self_attn")
    assert source_of(folder).read_packed(QKV, 64, CPU) is None


def test_a_fused_matrix_that_is_plain_in_part_is_refused(folders: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = folders(plain="k_proj")
    with pytest.raises(UnsupportedError, match="k_proj'\\] are not quantised"):
        source_of(folder).read_packed(QKV, 64, CPU)


@pytest.mark.parametrize("options", [{}, {"order": "shared", "version": 2, "symmetric": False}, {"order": "separate"}])
def test_a_survey_tells_the_bytes_before_reading(
    folders: Callable[..., tuple[Path, Path]], options: dict[str, Any]
) -> None:
    folder, _ = folders(**options)
    index, layout = read_headers(folder), PtLayout()
    config = read_gptq_config(json.loads((folder / "config.json").read_text()))
    assert config is not None
    survey = HeaderSurvey(index, layout)
    shapes = GptqSource(survey, index, layout, config).read_packed(QKV, 64, META)
    matrices = source_of(folder).read_packed(QKV, 64, CPU)
    assert shapes is not None
    assert matrices is not None
    assert [{key: (t.shape, t.dtype) for key, t in piece.tensors().items()} for piece in shapes] == [
        {key: (t.shape, t.dtype) for key, t in piece.tensors().items()} for piece in matrices
    ]
    assert sum(map(num_bytes, shapes)) == sum(map(num_bytes, matrices))
    asked_for = {f"{name}.{part}" for name in QKV for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert {tensor.key for tensor in survey.read()} == asked_for


def say(folder: Path, **entries: object) -> GptqSource:
    """Change what config.json says of the weights."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))
    return source_of(folder)


@pytest.mark.parametrize(
    ("options", "entries", "text"),
    [
        ({"version": 2, "symmetric": False}, {"sym": True}, "zeros other than 8"),
        ({"order": "shared"}, {"desc_act": False}, "inputs in another order"),
    ],
)
def test_a_config_that_does_not_tell_the_truth_is_refused(
    folders: Callable[..., tuple[Path, Path]], options: dict[str, Any], entries: dict[str, Any], text: str
) -> None:
    folder, _ = folders(**options)
    with pytest.raises(TensorError, match=text) as caught:
        say(folder, **entries).read(ATTENTION + "q_proj", 64, 64, CPU)
    assert next(iter(entries)) in caught.value.hint


def test_zeros_of_8_take_the_room_that_was_planned(folders: Callable[..., tuple[Path, Path]]) -> None:
    folder, reference = folders(order="stored")
    packed = say(folder, sym=False, desc_act=True).read(ATTENTION + "q_proj", 64, 64, CPU)
    assert packed.zeros is not None
    assert torch.equal(dequantize(packed), load_file(reference / "model.safetensors")[ATTENTION + "q_proj.weight"])


def change(folder: Path, **tensors: torch.Tensor | None) -> GptqSource:
    """Replace tensors of the query projection, or leave them out."""
    stored = load_file(folder / "model.safetensors")
    for part, tensor in tensors.items():
        stored.pop(f"{ATTENTION}q_proj.{part}")
        if tensor is not None:
            stored[f"{ATTENTION}q_proj.{part}"] = tensor
    save_file(stored, folder / "model.safetensors")
    return source_of(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "text"),
    [
        *((part, None, f"no tensor '{ATTENTION}q_proj.{part}'") for part in ("qzeros", "scales", "g_idx")),
        ("qweight", torch.zeros(8, 32, dtype=torch.int32), r"shape \[8, 32\], but the model needs \[8, 64\]"),
        ("qzeros", torch.zeros(2, 8), "stored as F32 and cannot be read as int32"),
        ("scales", torch.zeros(1, 64, dtype=torch.float16), r"shape \[1, 64\], but the model needs \[2, 64\]"),
        ("scales", torch.full((2, 64), torch.inf, dtype=torch.float16), "128 values that are not finite"),
        ("scales", torch.zeros(2, 64, dtype=torch.float64), "scales is float64"),
        ("g_idx", torch.arange(64, dtype=torch.int32), "q_proj.g_idx names groups from 0 to 63"),
    ],
)
def test_damaged_files_are_refused(
    folders: Callable[..., tuple[Path, Path]], part: str, tensor: torch.Tensor | None, text: str
) -> None:
    folder, _ = folders()
    source = change(folder, **{part: tensor})
    with pytest.raises(TensorError, match=text):
        source.read(ATTENTION + "q_proj", 64, 64, CPU)


def test_widths_that_do_not_divide_into_groups_are_refused(folders: Callable[..., tuple[Path, Path]]) -> None:
    folder, _ = folders(group_size=32)
    with pytest.raises(UnsupportedError, match="has 96 inputs, which do not divide into groups of 64"):
        say(folder, group_size=64).read("model.layers.0.mlp.down_proj", 64, 96, CPU)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_quantised_embedding_is_refused(folders: Callable[..., tuple[Path, Path]], name: str) -> None:
    folder, _ = folders()
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=name):
        source_of(folder)


def test_paddles_layouts_are_refused(folders: Callable[..., tuple[Path, Path]]) -> None:
    class OtherLayout:
        name = "paddle"

    folder, _ = folders()
    index = read_headers(folder)
    config = GptqConfig(group_size=32, stores_zero_minus_one=True, is_symmetric=True, reorders_inputs=False)
    with pytest.raises(UnsupportedError, match="layout 'paddle'"):
        GptqSource(TensorReader(index, PtLayout()), index, OtherLayout(), config)  # type: ignore[arg-type]
