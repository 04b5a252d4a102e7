"""Adapters that PEFT trained on transformers' vision-language class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from ernie45.checkpoint.adapter import read_adapter
from ernie45.errors import UnsupportedError
from tests.vl_models import picture, prompt_of, random_reference, reference_logits, save_reference, text_ids

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(folder: Path, **settings: Any) -> Any:
    """Let PEFT save a random adapter, and give the reference with that merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings})
    get_peft_model(random_reference(), config).save_pretrained(str(folder))
    merged: Any = PeftModel.from_pretrained(random_reference(), folder).merge_and_unload()
    return merged.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"shared_experts.up_proj": 2, r"language_model\.layers\.1\.self_attn\.q_proj": 1}},
        {"alpha_pattern": {"o_proj": 9}, "use_rslora": True},
    ],
)
def test_attention_dense_and_shared_weights_are_merged_as_peft_does(
    tokenizer_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = save_reference(random_reference(), tmp_path / "base", tokenizer_folder)
    merged = save_adapter(tmp_path / "adapter", target_modules=ATTENTION_AND_MLP, **settings)
    names = read_adapter(tmp_path / "adapter").names
    # Three layers of attention, one dense MLP, two shared ones.
    assert len(names) == 3 * 4 + 3 + 2 * 3
    assert {"model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight"} < set(names)
    prompt = prompt_of(text_ids(5), picture(4, 6), text_ids(3, seed=1))
    expected = reference_logits(merged, prompt)
    with ErnieModel.from_pretrained(folder, adapter=tmp_path / "adapter", device="cpu", progress=False) as model:
        torch.testing.assert_close(model.logits(prompt), expected, atol=1e-4, rtol=0)
    assert (reference_logits(random_reference(), prompt) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "qkv"]}, r"vision_tower\.blocks\.\d\.attn\.qkv"),
        ({"target_modules": ["resampler_model.mlp"]}, r"resampler_model\.mlp"),
        ({"target_modules": [], "target_parameters": ["text_moe.experts.down_proj"]}, r"text_moe\.experts"),
        ({"target_modules": [], "target_parameters": ["vision_moe.gate.weight"]}, r"vision_moe\.gate"),
    ],
)
def test_other_targets_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **settings)
    get_peft_model(random_reference(), config).save_pretrained(str(tmp_path))
    with pytest.raises(UnsupportedError, match=named) as caught:
        read_adapter(tmp_path)
    assert "text trunk" in str(caught.value)
