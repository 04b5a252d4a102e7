"""What a packed folder holds, byte by byte: names, order, values, places."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.adapter import read_adapter
from ernie45.checkpoint.headers import TensorInfo, read_headers, read_json
from ernie45.checkpoint.open import open_checkpoint, open_source, read_config
from ernie45.checkpoint.read import PackedSource
from ernie45.checkpoint.resolve import resolve
from ernie45.errors import TensorError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.quantization.packed import PackedInt4, PackedInt8, dequantize, empty_packed
from ernie45.quantization.panels import PanelInt4, StoredMatrix, in_panels, in_rows
from ernie45.quantization.quantize import quantize_into
from ernie45.saving import save_checkpoint
from ernie45.spec import parse_spec
from tests.gptq_files import write_gptq_folder
from tests.packed_files import as_version_1, stored_panels
from tests.paddle_files import CONFIG, EXPERTS, FileLayout, FloatDtype, random_pt, write_checkpoint

MakeCheckpoint = Callable[..., Path]
WIDE = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MIXTURE = {**WIDE, **EXPERTS, "moe_intermediate_size": 32}


def pack(source: Path, folder: Path, preset: str | QuantPreset, **options: Any) -> Path:
    chosen = preset if isinstance(preset, QuantPreset) else PRESETS[preset]
    save_checkpoint(source, folder, chosen, progress=False, **options)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rounded(scheme: str, *parts: torch.Tensor) -> StoredMatrix:
    weight = torch.cat(parts)
    packed = empty_packed(scheme, weight.shape[0], weight.shape[1], 32, torch.device("cpu"))
    quantize_into(packed, weight)
    return in_panels(packed) if isinstance(packed, PackedInt4) else packed


def assert_holds(stored: dict[str, torch.Tensor], name: str, packed: StoredMatrix) -> None:
    for leaf, tensor in packed.tensors().items():
        assert torch.equal(stored[f"{name}.{leaf}"], tensor), f"{name}.{leaf}"
    assert {f"{name}.{leaf}" for leaf in packed.tensors()} == {key for key in stored if key.startswith(f"{name}.")}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", random_pt(MIXTURE), MIXTURE, layout="pt", dtype="BF16")


def test_matrices_are_stored_as_memory_has_them(mixture: Path, tmp_path: Path) -> None:
    source, stored = tensors_of(mixture), tensors_of(pack(mixture, tmp_path / "out", "int4"))
    prefix = "model.layers.1.self_attn."
    qkv = [source[f"{prefix}{name}_proj.weight"] for name in "qkv"]
    assert_holds(stored, f"{prefix}qkv_proj", rounded("int4", *qkv))
    assert_holds(stored, f"{prefix}o_proj", rounded("int4", source[f"{prefix}o_proj.weight"]))
    for module in ("model.layers.0.mlp.", "model.layers.2.mlp.experts.3.", "model.layers.1.mlp.shared_experts."):
        gate_up = [source[f"{module}{name}_proj.weight"] for name in ("gate", "up")]
        assert_holds(stored, f"{module}gate_up_proj", rounded("int4", *gate_up))
    embedding = rounded("int8", source["model.embed_tokens.weight"])
    assert isinstance(embedding, PackedInt8)
    assert_holds(stored, "model.embed_tokens", embedding)


def test_what_the_preset_leaves_alone_is_stored_as_it_was(mixture: Path, tmp_path: Path) -> None:
    preset = QuantPreset(name="mine", experts="int4")
    source, stored = tensors_of(mixture), tensors_of(pack(mixture, tmp_path / "out", preset))
    plain = {name: tensor for name, tensor in source.items() if ".experts." not in name}
    assert plain.keys() == {name for name in stored if ".experts." not in name}
    for name, tensor in plain.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_config_says_what_the_files_are(mixture: Path, tmp_path: Path) -> None:
    (mixture / "chat_template.jinja").write_text("{{ messages }}")
    (mixture / "modeling.py").write_text("raise SystemExit")
    preset = QuantPreset(name="mine", experts="int4", embedding="int8")
    folder = pack(mixture, tmp_path / "out", preset)
    config, before = read_json(folder / "config.json"), read_json(mixture / "config.json")
    assert config.pop("quantization_config") == {
        "quant_method": "ernie45",
        "format_version": 2,
        "preset": {"name": "mine", "experts": "int4", "linear": None, "embedding": "int8"},
    }
    assert config == {**before, "dtype": "bfloat16"}  # which its scales, in float32, would hide
    assert set(files_of(folder)) == {"config.json", "chat_template.jinja", "model.safetensors"}


def test_without_a_preset_it_is_a_plain_pt_folder(tmp_path: Path) -> None:
    tensors = random_pt(MIXTURE)
    paddle = write_checkpoint(tmp_path / "paddle", tensors, MIXTURE, layout="paddleformers", dtype="U16")
    folder = pack(paddle, tmp_path / "out", "none")
    stored = tensors_of(folder)
    assert stored.keys() == tensors.keys()
    for name, values in tensors.items():
        assert torch.equal(stored[name].float(), torch.from_numpy(values)), name
    assert not {"source", "paddleformers_version", "quantization_config"} & read_json(folder / "config.json").keys()


@pytest.mark.parametrize(
    ("layout", "dtype", "num_shards"), [("paddle", "U16", 2), ("paddleformers", "BF16", 1), ("pt", "BF16", 3)]
)
def test_the_same_weights_give_the_same_files(
    tmp_path: Path, layout: FileLayout, dtype: FloatDtype, num_shards: int
) -> None:
    config = {**MIXTURE, "tie_word_embeddings": False, "use_bias": True}
    tensors = random_pt(config)
    weights = []
    for name, kind, bits, shards in (("one", "pt", "BF16", 1), ("other", layout, dtype, num_shards)):
        source = tmp_path / f"{name} source"
        write_checkpoint(source, tensors, config, layout=kind, dtype=bits, num_shards=shards)  # type: ignore[arg-type]
        weights.append((pack(source, tmp_path / name, "int4") / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_packing_a_packed_folder_copies_it(mixture: Path, tmp_path: Path) -> None:
    first = pack(mixture, tmp_path / "first", "int4", max_shard_bytes=40_000)
    assert files_of(pack(first, tmp_path / "second", "int4", max_shard_bytes=40_000)) == files_of(first)
    with pytest.raises(UnsupportedError, match="packed as 'int4', and cannot be packed as 'int8'"):
        pack(first, tmp_path / "third", "int8")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"qkv_proj.codes", "qkv_proj.scales"}),
        (
            {"order": "shared", "symmetric": False, "version": 2},
            {f"qkv_proj.{leaf}" for leaf in ("codes", "scales", "zeros", "input_order")},
        ),
        (
            {"order": "separate"},
            {f"{name}_proj.{leaf}" for name in "qkv" for leaf in ("codes", "scales", "input_order")},
        ),
    ],
)
def test_gptq_keeps_its_values(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any], names: set[str]
) -> None:
    source = make_checkpoint(tmp_path / "source", hidden_size=64, intermediate_size=96, tokenizer=False)
    write_gptq_folder(source, tmp_path / "gptq", tmp_path / "reference", **options)
    folder = pack(tmp_path / "gptq", tmp_path / "out", "none")
    stored, prefix = tensors_of(folder), "model.layers.0.self_attn."
    found = {name.removeprefix(prefix) for name in stored if name.startswith(prefix) and ".o_proj." not in name}
    assert found == names
    for preset in ("int8", "int4", QuantPreset(name="gptq", embedding="int8")):
        with pytest.raises(UnsupportedError, match="cannot be had of weights that are stored as 'gptq'"):
            pack(tmp_path / "gptq", tmp_path / "other", preset)
    assert not (tmp_path / "other").exists()
    config = read_config(folder)
    reader = open_source(open_checkpoint(folder, config, parse_spec(config)))
    assert isinstance(reader, PackedSource)
    for module, widths, in_features in (("self_attn", {"q": 64, "k": 32, "v": 32}, 64), ("mlp", {"down": 64}, 96)):
        parts = {f"model.layers.0.{module}.{name}_proj": rows for name, rows in widths.items()}
        pieces = reader.read_packed(parts, in_features, torch.device("cpu"))
        assert pieces is not None
        expected = torch.cat([tensors_of(tmp_path / "reference")[f"{name}.weight"] for name in parts])
        values = [dequantize(piece) for piece in pieces if not isinstance(piece, PanelInt4)]
        assert torch.equal(torch.cat(values), expected)


def test_tensors_follow_the_build_and_start_on_cache_lines(mixture: Path, tmp_path: Path) -> None:
    index = read_headers(pack(mixture, tmp_path / "out", "int4"))
    whole = [info for info in index.tensors.values() if info.num_bytes % 64 == 0]
    rest = [info for info in index.tensors.values() if info.num_bytes % 64]
    assert all(info.start % 64 == 0 for info in whole)
    assert list(index.tensors.values()) == [*whole, *rest]
    item_bytes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    assert rest
    assert all(info.start % item_bytes[info.dtype] == 0 for info in rest)
    names = [info.name for info in whole]
    assert names[0] == "model.embed_tokens.codes"
    expert = names.index("model.layers.1.mlp.experts.2.gate_up_proj.panels")
    assert names[expert : expert + 4] == [
        f"model.layers.1.mlp.experts.2.{name}_proj.{leaf}"
        for name in ("gate_up", "down")
        for leaf in ("panels", "row_scales")
    ]


def expert_ranges(folder: Path) -> dict[str, list[tuple[Path, int, int]]]:
    """The ranges of bytes, file by file, that the tensors of each routed expert take."""
    tensors: dict[str, list[TensorInfo]] = {}
    for info in sorted(read_headers(folder).tensors.values(), key=lambda info: (info.file, info.start)):
        match = re.match(r"model\.layers\.\d+\.mlp\.experts\.\d+\.", info.name)
        if match:
            tensors.setdefault(match[0], []).append(info)
    ranges: dict[str, list[tuple[Path, int, int]]] = {}
    for expert, infos in tensors.items():
        ranges[expert] = []
        for info in infos:
            file, start, stop = ranges[expert][-1] if ranges[expert] else (None, 0, 0)
            if (file, stop) == (info.file, info.start):
                ranges[expert][-1] = (info.file, start, stop + info.num_bytes)
            else:
                ranges[expert].append((info.file, info.start, info.start + info.num_bytes))
    return ranges


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("name", ["tiny-moe", "tiny-vl"])
def test_an_expert_is_one_range_of_one_file(tmp_path: Path, name: str, preset: str) -> None:
    folder = pack(resolve(f"ernie45/{name}", progress=False), tmp_path / "out", preset, max_shard_bytes=500_000)
    ranges = expert_ranges(folder)
    assert len(ranges) >= 16
    assert {len(found) for found in ranges.values()} == {1}
    assert all(start % 64 == 0 for ((_, start, _),) in ranges.values())
    assert len({file for ((file, _, _),) in ranges.values()}) > 1
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert sum(sizes) / len(sizes) > 250_000  # that no expert is split leaves little of a file empty


@pytest.mark.parametrize("shape", [{"hidden_size": 20}, {"moe_intermediate_size": 36}, {"moe_intermediate_size": 20}])
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_an_expert_of_odd_sizes_is_two_ranges_at_most(tmp_path: Path, shape: dict[str, int], preset: str) -> None:
    config = {**MIXTURE, **shape}
    tensors = random_pt(config, expert_biases=True)
    source = write_checkpoint(tmp_path / "source", tensors, config, layout="pt", dtype="BF16")
    ranges = expert_ranges(pack(source, tmp_path / "out", preset, max_shard_bytes=20_000))
    assert len(ranges) == 8
    assert {len(found) for found in ranges.values()} == {2}
    assert all(first[0] == second[0] for first, second in ranges.values())


def test_a_long_matrix_is_read_again_for_what_lies_apart(mixture: Path, tmp_path: Path) -> None:
    """50 scales are no whole lines, so that they come after all else, and another matrix was made in between."""
    folder = pack(mixture, tmp_path / "out", "int4")
    tensors = read_headers(folder).tensors
    assert tensors["model.embed_tokens.scales"].start > tensors["model.norm.weight"].start
    embedding = rounded("int8", tensors_of(mixture)["model.embed_tokens.weight"])
    assert_holds(tensors_of(folder), "model.embed_tokens", embedding)


def test_shards_and_their_index(mixture: Path, tmp_path: Path) -> None:
    folder = pack(mixture, tmp_path / "out", "int8", max_shard_bytes=50_000)
    index = read_headers(folder)
    assert len({info.file for info in index.tensors.values()}) > 2
    whole = tensors_of(pack(mixture, tmp_path / "whole", "int8"))
    stored = tensors_of(folder)
    assert stored.keys() == whole.keys()
    assert all(torch.equal(stored[name], whole[name]) for name in whole)


def test_a_row_that_does_not_divide_into_groups_is_stored_in_8_bits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_pt(CONFIG), CONFIG, layout="pt")  # hidden size 24
    stored = tensors_of(pack(source, tmp_path / "out", "int4"))
    assert stored["model.layers.0.self_attn.qkv_proj.codes"].dtype == torch.int8
    assert stored["model.layers.0.self_attn.o_proj.panels"].dtype == torch.uint8


def test_an_adapter_is_merged_before_rounding(mixture: Path, tmp_path: Path) -> None:
    down, gate = "model.layers.1.mlp.experts.0.down_proj", "model.layers.1.mlp.gate"
    factors = {
        f"base_model.model.{module}.lora_{factor}.weight": torch.full(shape, 0.5)
        for module, rows, columns in ((down, 64, 32), (gate, 4, 64))
        for factor, shape in (("A", (2, columns)), ("B", (rows, 2)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [down, gate]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    folder = pack(mixture, tmp_path / "out", "int8", adapter=read_adapter(tmp_path / "adapter"))
    source, stored = tensors_of(mixture), tensors_of(folder)
    assert_holds(stored, down, rounded("int8", (source[f"{down}.weight"].float() + 0.5).bfloat16()))
    torch.testing.assert_close(stored[f"{gate}.weight"], source[f"{gate}.weight"] + 0.5)
    with pytest.raises(UnsupportedError, match=r"cannot be merged: the weights in .*out are quantised"):
        pack(folder, tmp_path / "again", "int8", adapter=read_adapter(tmp_path / "adapter"))


def test_bitsandbytes_presets_have_no_place_in_files(mixture: Path, tmp_path: Path) -> None:
    for name in ("nf4", "bnb-int8"):
        with pytest.raises(UnsupportedError, match=f"stores matrices as '{name}'"):
            pack(mixture, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_what_loading_refuses_is_refused_before_anything_is_written(mixture: Path, tmp_path: Path) -> None:
    tensors = tensors_of(mixture)
    tensors["model.layers.7.extra.weight"] = torch.ones(2)
    save_file(tensors, mixture / "model.safetensors")
    with pytest.raises(TensorError, match=r"model\.layers\.7\.extra\.weight"):
        pack(mixture, tmp_path / "out", "int4")
    del tensors["model.layers.7.extra.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, mixture / "model.safetensors")
    with pytest.raises(TensorError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        pack(mixture, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_the_head_of_multi_token_prediction_is_packed_like_the_rest(tmp_path: Path) -> None:
    config = {**MIXTURE, "num_nextn_predict_layers": 1}
    source = write_checkpoint(tmp_path / "source", random_pt(config, mtp=True), config, layout="pt")
    plan = save_checkpoint(source, tmp_path / "out", PRESETS["int4"], progress=False)
    assert plan.dropped == ()
    stored = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "out").items() if "mtp" in name}
    for module in ("mtp_block.0.self_attn.qkv_proj", "mtp_block.0.mlp.gate_up_proj", "mtp_linear_proj.0"):
        assert stored[f"model.{module}.panels"] == torch.uint8
    assert stored["model.mtp_emb_norm.0.weight"] == tensors_of(source)["model.mtp_emb_norm.0.weight"].dtype


def test_four_bits_and_their_scales_are_what_the_format_says(mixture: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.1.down_proj"  # of one group: a dword of scales, and four of codes
    weight, stored = tensors_of(mixture)[f"{name}.weight"].float(), tensors_of(pack(mixture, tmp_path / "out", "int4"))
    assert stored[f"{name}.panels"].shape == (1, 5, 64, 4)
    rows = stored[f"{name}.panels"][0].transpose(0, 1).flatten(1)
    codes = rows[:, 4:].view(64, 1, 16)
    unpacked = torch.cat((codes & 15, codes >> 4), dim=2).view(64, 32).int() - 8
    steps = rows[:, :1].view(torch.int8).float() * stored[f"{name}.row_scales"][:, None]
    assert (unpacked * steps - weight).abs().max() < 0.6 * steps.abs().max()
    assert not rows[:, 1:4].any()
    torch.testing.assert_close(in_rows(stored_panels(stored, name)).rows(0, 64), unpacked * steps)


def test_a_matrix_that_is_written_in_pieces_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are whole panels; the last rows fill none."""
    monkeypatch.setattr("ernie45.checkpoint.packing.BLOCK_BYTES", 130 * 64)
    config = {**WIDE, "intermediate_size": 160}  # 320 rows of gate and up
    source = write_checkpoint(tmp_path / "source", random_pt(config), config, layout="pt", dtype="BF16")
    for preset in ("int4", "int8"):
        weights, stored = tensors_of(source), tensors_of(pack(source, tmp_path / preset, preset))
        for module, names in (("self_attn.qkv", "qkv"), ("self_attn.o", "o"), ("mlp.gate_up", ("gate", "up"))):
            prefix = f"model.layers.0.{module.partition('.')[0]}."
            parts = [weights[f"{prefix}{name}_proj.weight"] for name in names]
            assert_holds(stored, f"model.layers.0.{module}_proj", rounded(preset, *parts))


def test_a_version_1_folder_is_packed_again_as_it_is(mixture: Path, tmp_path: Path) -> None:
    old = as_version_1(pack(mixture, tmp_path / "packed", "int4"), tmp_path / "old")
    stored = tensors_of(pack(old, tmp_path / "again", "int4"))
    before = tensors_of(old)
    assert stored.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.items())
