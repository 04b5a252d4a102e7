"""A saved model is the model: the same logits, bit for bit, as if it were quantised while loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ernie45 import ErnieModel
from ernie45.backends.base import Batch
from ernie45.backends.mtp import MtpHead
from ernie45.checkpoint.headers import read_json
from ernie45.errors import ErnieError, UnsupportedError
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import save_checkpoint
from tests.packed_files import as_version_1
from tests.paddle_files import CONFIG, EXPERTS, Array, FileLayout, FloatDtype, random_pt, write_checkpoint

DENSE = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MIXTURE = {**DENSE, **EXPERTS, "moe_intermediate_size": 32}
CASES: dict[str, tuple[dict[str, Any], FileLayout, dict[str, Any]]] = {
    "dense": (DENSE, "pt", {}),
    "rows that do not divide": (CONFIG, "pt", {}),
    "experts": (MIXTURE, "pt", {"mtp": True}),
    "experts with biases": ({**MIXTURE, "use_bias": True}, "pt", {"expert_biases": True}),
    "a head of its own": ({**DENSE, "tie_word_embeddings": False, "use_bias": True}, "pt", {}),
    "Paddle": ({**MIXTURE, "tie_word_embeddings": False}, "paddle", {}),
    "PaddleFormers": (MIXTURE, "paddleformers", {}),
}
MINE = QuantPreset(name="mine", experts="int4", linear="int8")
IDS = list(range(3, 40))


def logits(folder: Path | str, quantization: str | QuantPreset, **options: Any) -> torch.Tensor:
    with ErnieModel.from_pretrained(
        folder, quantization=quantization, device="cpu", progress=False, context_tokens=64, max_batch=1, **options
    ) as model:
        return model.logits(IDS)


def saved(source: Path | str, folder: Path, quantization: str | QuantPreset, **options: Any) -> Path:
    with ErnieModel.from_pretrained(
        source, quantization=quantization, device="cpu", progress=False, context_tokens=64, max_batch=1, **options
    ) as model:
        model.save_pretrained(folder, progress=False)
    return folder


@pytest.mark.parametrize(("config", "layout", "extra"), CASES.values(), ids=CASES)
def test_reloading_gives_the_logits_of_quantising(
    tmp_path: Path, config: dict[str, Any], layout: FileLayout, extra: dict[str, Any]
) -> None:
    source = write_checkpoint(tmp_path / "source", random_pt(config, **extra), config, layout=layout, dtype="BF16")
    for preset in (PRESETS["int8"], PRESETS["int4"], MINE):
        folder = tmp_path / preset.name
        save_checkpoint(source, folder, preset, progress=False)
        assert torch.equal(logits(folder, "auto"), logits(source, preset))


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("case", ["dense", "experts"])
def test_so_it_does_without_native_kernels(tmp_path: Path, case: str) -> None:
    config, layout, extra = CASES[case]
    source = write_checkpoint(tmp_path / "source", random_pt(config, **extra), config, layout=layout, dtype="BF16")
    save_checkpoint(source, tmp_path / "out", PRESETS["int4"], progress=False)
    assert torch.equal(logits(tmp_path / "out", "auto"), logits(source, "int4"))


@pytest.mark.parametrize("case", ["dense", "rows that do not divide", "experts with biases", "a head of its own"])
def test_a_folder_of_version_1_gives_the_same_logits(tmp_path: Path, case: str) -> None:
    config, layout, extra = CASES[case]
    source = write_checkpoint(tmp_path / "source", random_pt(config, **extra), config, layout=layout, dtype="BF16")
    save_checkpoint(source, tmp_path / "out", PRESETS["int4"], progress=False)
    old = as_version_1(tmp_path / "out", tmp_path / "old")
    assert not [name for name in load_file(old / "model.safetensors") if name.endswith(".panels")]
    assert torch.equal(logits(old, "auto"), logits(tmp_path / "out", "auto"))


@pytest.mark.parametrize("name", ["ernie45/tiny-dense", "ernie45/tiny-moe", "ernie45/tiny-vl"])
def test_a_saved_model_answers_the_same(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "out", "int4")
    assert torch.equal(logits(folder, "auto"), logits(name, "int4"))
    again = saved(folder, tmp_path / "again", "auto")
    assert _files(again) == _files(folder)


def test_pictures_are_seen_the_same(tmp_path: Path) -> None:
    picture = Image.new("RGB", (112, 112), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    folder = saved("ernie45/tiny-vl", tmp_path / "out", "int8")
    found = []
    for path in (folder, "ernie45/tiny-vl"):
        with ErnieModel.from_pretrained(
            path, quantization="int8", device="cpu", progress=False, context_tokens=256, max_batch=1
        ) as model:
            found.append(model.logits(model.render([{"role": "user", "content": content}])))
    assert torch.equal(*found)


@pytest.mark.parametrize("quantization", ["int8", "int4", "none"])
def test_a_saved_model_guesses_the_same(tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guessed: list[torch.Tensor] = []
    compute = MtpHead.__call__

    def keep(head: MtpHead, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        guessed.append(compute(head, batch, hidden).clone())
        return guessed[-1]

    folder = saved("ernie45/tiny-moe", tmp_path / "out", quantization)
    monkeypatch.setattr(MtpHead, "__call__", keep)
    found = []
    for path in ("ernie45/tiny-moe", folder):
        with ErnieModel.from_pretrained(
            path, quantization=quantization, device="cpu", progress=False, max_batch=1, draft="mtp"
        ) as model:
            model.chat([{"role": "user", "content": "What is the capital of France?"}], temperature=0)
        # The first guess: whether there are more depends on the time they take.
        found.append((model.plan.parts["draft"], next(logits for logits in guessed if len(logits))))
        guessed.clear()
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("missing", ["mtp_emb_norm.0", "mtp_block.0.self_attn.k_proj", "mtp_linear_proj.0"])
def test_a_head_that_lacks_a_tensor_is_left_out(tmp_path: Path, missing: str) -> None:
    config = {**MIXTURE, "num_nextn_predict_layers": 1}
    tensors = random_pt(config, mtp=True)
    del tensors[f"model.{missing}.weight"]
    source = write_checkpoint(tmp_path / "source", tensors, config, layout="pt", dtype="BF16")
    plan = save_checkpoint(source, tmp_path / "out", PRESETS["int4"], progress=False)
    assert {tensor.name for tensor in plan.dropped} == {name for name in tensors if ".mtp_" in name}
    assert torch.equal(logits(tmp_path / "out", "auto"), logits(source, "int4"))


def test_without_a_preset_a_pt_folder_is_saved(tmp_path: Path) -> None:
    folder = saved("ernie45/tiny-moe", tmp_path / "out", "none")
    assert "quantization_config" not in read_json(folder / "config.json")
    assert torch.equal(logits(folder, "none"), logits("ernie45/tiny-moe", "none"))


def test_two_saves_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (saved("ernie45/tiny-dense", tmp_path / name, "int8") for name in ("first", "second"))
    assert _files(first) == _files(second)


def test_a_reloaded_model_holds_the_bytes_of_the_preset(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", random_pt(MIXTURE), MIXTURE, layout="pt", dtype="BF16")
    folder = saved(source, tmp_path / "out", "int4")
    reports = []
    for path, quantization in ((source, "int4"), (folder, "auto")):
        with ErnieModel.from_pretrained(path, quantization=quantization, device="cpu", progress=False) as model:
            reports.append(model.load_report)
    assert reports[0].weight_bytes == reports[1].weight_bytes
    assert "model.layers.1.mlp.experts.0.gate_up_proj.panels" in {tensor.key for tensor in reports[1].read}


def test_a_packed_folder_is_not_packed_otherwise(tmp_path: Path) -> None:
    folder = saved("ernie45/tiny-dense", tmp_path / "out", "int8")
    for quantization in ("int4", "nf4"):
        with pytest.raises(ErnieError, match="int8"):
            logits(folder, quantization)
    assert torch.equal(logits(folder, "int8"), logits(folder, "auto"))


def test_bitsandbytes_models_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stores matrices as 'nf4'"):
        saved("ernie45/tiny-dense", tmp_path / "out", "nf4")


def adapter_for(folder: Path, hidden_size: int) -> Path:
    """A LoRA adapter of a layer's query projection [64, hidden]."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight": torch.randn(
            shape, generator=generator
        )
        for factor, shape in (("A", (2, hidden_size)), ("B", (64, 2)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("stored", "computed"), [("BF16", "float32"), ("F32", "bfloat16")])
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
@pytest.mark.parametrize("adapted", [True, False])
def test_a_model_of_another_dtype_than_its_files_is_saved_as_it_is(
    tmp_path: Path, stored: FloatDtype, computed: str, preset: str, adapted: bool
) -> None:
    config = {**MIXTURE, "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[stored]}
    source = write_checkpoint(tmp_path / "source", _fine(random_pt(config)), config, layout="pt", dtype=stored)
    adapter = adapter_for(tmp_path / "adapter", 64) if adapted else None
    folder = saved(source, tmp_path / "out", preset, dtype=computed, adapter=adapter)
    expected = logits(source, preset, dtype=computed, adapter=adapter)
    assert torch.equal(logits(folder, "auto" if adapted else preset, dtype="auto" if adapted else computed), expected)
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert norm.dtype == {"BF16": torch.bfloat16, "F32": torch.float32}[stored]


def test_a_folder_by_a_relative_name_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "source", random_pt(DENSE), DENSE, layout="pt", dtype="BF16")
    adapter_for(tmp_path / "adapter", 64)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ErnieModel.from_pretrained("./source", adapter="adapter", device="cpu", progress=False) as model:
        monkeypatch.chdir(tmp_path / "elsewhere")
        model.save_pretrained("out", progress=False)
        assert torch.equal(logits(tmp_path / "elsewhere" / "out", "none"), model.logits(IDS))


def _fine(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Values between those of bfloat16, where the files have room for them."""
    return {name: values * np.float32(1.001) for name, values in tensors.items()}


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
