"""Converting vision-language checkpoints: transformers opens what comes out, and gives the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45 import ErnieModel
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.write import write_file
from ernie45.commands import convert as convert_module
from ernie45.commands.convert import ConvertReport, convert
from ernie45.errors import ConfigError, UnsupportedError
from tests.commands.published_vl import as_published
from tests.vl_models import IDS, picture, prompt_of, random_reference, reference_logits, save_reference, text_ids


def to_pt(source: Path, destination: Path, **options: Any) -> ConvertReport:
    return convert(source, destination, progress=False, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def opened(folder: Path) -> Any:
    """transformers' model of a folder, which must have every tensor that it wants and no other."""
    from transformers import AutoModelForImageTextToText

    model: Any
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "Ernie4_5_VLMoeForConditionalGeneration"
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> Any:
    return random_reference(tie_word_embeddings=False, text={"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def native(reference: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(reference, tmp_path_factory.mktemp("vl") / "native", tokenizer_folder)


@pytest.mark.parametrize("kind", ["", "bf16"])
def test_paddle_s_logits_come_out_of_the_converted_folder(shared_fixtures: Path, tmp_path: Path, kind: str) -> None:
    source = shared_fixtures / "paddle" / "vl" / kind
    to_pt(source, tmp_path / "out", max_shard_bytes=300_000)
    model, expected = opened(tmp_path / "out"), load_file(source / "reference.safetensors")
    ids = expected["input_ids"]
    with torch.inference_mode():
        with_pictures = model(
            input_ids=ids,
            pixel_values=expected["pixel_values"],
            image_grid_thw=expected["grid_thw"],
            position_ids=expected["position_ids"].permute(2, 0, 1),
            moe_mm_token_type_ids=expected["token_type_ids"][:, : ids.shape[1]].int(),
        ).logits
        text_only = model(input_ids=expected["text_only.input_ids"]).logits
    torch.testing.assert_close(with_pictures, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(text_only, expected["text_only.logits"], atol=1e-4, rtol=0)


def test_names_axes_and_dtypes_are_those_of_the_published_torch_files(shared_fixtures: Path, tmp_path: Path) -> None:
    source = shared_fixtures / "paddle" / "vl" / "bf16"
    report = to_pt(source, tmp_path / "out")
    stored, converted = tensors_of(source), tensors_of(tmp_path / "out")
    assert report.num_tensors == len(converted) == 233
    layer = "layers.1.mlp."
    for gate in ("gate.weight", "gate.weight_1"):  # as stored: the routers of this family lie [h, experts] everywhere
        assert torch.equal(converted[f"model.{layer}{gate}"], stored[f"ernie.{layer}{gate}"])
        assert converted[f"model.{layer}{gate}"].shape == (64, 8)
    assert converted[f"model.{layer}moe_statics.e_score_correction_bias"].shape == (2, 8)
    assert converted[f"model.{layer}experts.7.gate_proj.weight"].shape == (24, 64)
    assert converted[f"model.{layer}experts.8.gate_proj.weight"].shape == (16, 64)
    assert converted["vision_model.patch_embed.proj.weight"].shape == (16, 588)
    assert converted["vision_model.blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert converted["model.resampler_model.temporal_linear.0.weight"].shape == (64, 128)
    in_float32 = {name.split(".mlp.")[1] for name, info in read_headers(tmp_path / "out").tensors.items()
                  if info.dtype == "F32"}  # fmt: skip
    assert in_float32 == {"gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias"}


def test_config_of_paddle_s_model(shared_fixtures: Path, tmp_path: Path) -> None:
    to_pt(shared_fixtures / "paddle" / "vl" / "bf16", tmp_path / "out")
    config = config_of(tmp_path / "out")
    text, vision = config.pop("text_config"), config.pop("vision_config")
    assert config == {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": 370,
        "model_type": "ernie4_5_vl_moe",
        "tie_word_embeddings": True,
    }
    assert text["model_type"] == "ernie4_5_vl_moe_text"
    assert text["rope_parameters"] == {"rope_theta": 500000.0, "rope_type": "default", "mrope_section": [2, 2, 4]}
    assert text["mlp_layer_types"] == ["dense", "sparse", "sparse", "sparse"]
    assert text["moe_intermediate_size"] == [24, 16]
    assert (text["moe_num_experts"], text["moe_k"], text["moe_num_shared_experts"]) == (8, 3, 2)
    assert (text["pad_token_id"], text["bos_token_id"], text["eos_token_id"]) == (0, 1, 2)
    assert vision == {
        "model_type": "ernie4_5_vl_moe_vision", "depth": 2, "hidden_size": 16, "hidden_act": "quick_gelu",
        "intermediate_size": 64, "num_heads": 2, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_merge_size": 2, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"},
    }  # fmt: skip


@pytest.mark.parametrize("form", ["native", "published"])
def test_a_torch_folder_in_either_form(reference: Any, native: Path, tmp_path: Path, form: str) -> None:
    source = native if form == "native" else as_published(native, tmp_path / "published")
    (source / "Roboto-Regular.ttf").write_bytes(b"a font")
    report = to_pt(source, tmp_path / "out", max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    copied = {"Roboto-Regular.ttf", "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.model"}
    assert copied < set(report.files)
    before = {
        name.replace("model.vision_model.", "vision_model."): tensor for name, tensor in tensors_of(source).items()
    }
    after = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    prompt = prompt_of(text_ids(5), picture(4, 6), text_ids(3, seed=1))
    expected = reference_logits(reference, prompt)
    torch.testing.assert_close(reference_logits(opened(tmp_path / "out"), prompt), expected, atol=1e-5, rtol=0)
    with ErnieModel.from_pretrained(tmp_path / "out", device="cpu", progress=False) as model:
        torch.testing.assert_close(model.logits(prompt), expected, atol=1e-4, rtol=0)


def test_token_ids_go_by_their_names_in_the_tokenizer(native: Path, tmp_path: Path) -> None:
    source = as_published(native, tmp_path / "published")
    config = config_of(source) | {"im_patch_id": 1}
    (source / "config.json").write_text(json.dumps(config))
    to_pt(source, tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert {key: value for key, value in written.items() if key.endswith("token_id")} == {
        "image_token_id": IDS["<|IMAGE_PLACEHOLDER|>"],
        "image_start_token_id": IDS["<|IMAGE_START|>"],
        "image_end_token_id": IDS["<|IMAGE_END|>"],
        "video_token_id": IDS["<|VIDEO_PLACEHOLDER|>"],
        "video_start_token_id": IDS["<|VIDEO_START|>"],
        "video_end_token_id": IDS["<|VIDEO_END|>"],
    }


def test_a_folder_that_names_no_placeholder_is_refused(native: Path, tmp_path: Path) -> None:
    source = as_published(native, tmp_path / "published")
    for file in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        (source / file).unlink()
    config = config_of(source)
    del config["im_patch_id"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="im_patch_id is missing"):
        to_pt(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config | {"im_patch_id": "x"}))
    with pytest.raises(ConfigError, match="image_token_id is 'x'"):
        to_pt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_cannot_hold_is_refused(native: Path, tmp_path: Path) -> None:
    source = as_published(native, tmp_path / "published")
    config = config_of(source)
    (source / "config.json").write_text(json.dumps(config | {"freq_allocation": 3}))
    with pytest.raises(UnsupportedError, match="of 8 rotary frequencies 3 turn with time"):
        to_pt(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(source) | {"lm_head.bias": torch.zeros(384)}, source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"lm_head\.bias"):
        to_pt(source, tmp_path / "out")


def test_without_correction_biases(native: Path, tmp_path: Path) -> None:
    source = as_published(native, tmp_path / "published")
    (source / "config.json").write_text(json.dumps(config_of(source) | {"moe_use_aux_free": False}))
    kept = {name: tensor for name, tensor in tensors_of(source).items() if "moe_statics" not in name}
    save_file(kept, source / "model.safetensors")
    to_pt(source, tmp_path / "out")
    with ErnieModel.from_pretrained(tmp_path / "out", device="cpu", progress=False) as model:
        assert model.spec.experts is not None
        assert not model.spec.experts.has_correction_bias


def test_an_interrupted_conversion_goes_on(
    shared_fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_fixtures / "paddle" / "vl"
    to_pt(source, tmp_path / "whole", max_shard_bytes=300_000)

    def stopping(path: Path, content: bytes) -> None:
        if path.name == "config.json":
            raise KeyboardInterrupt
        write_file(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, "write_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            to_pt(source, tmp_path / "out", max_shard_bytes=300_000)
    report = to_pt(source, tmp_path / "out", max_shard_bytes=300_000)
    assert report.resumed_bytes > 1_000_000
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
