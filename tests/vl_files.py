"""Writes transformers' vision-language weights in the published forms, by the documented mapping of names; no code of
the package, and nothing that transformers saved, is used, so that a mistake there shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.paddle_files import Array, FloatDtype, lay_out, write_stored

_PARTS = {".fc1.": ".0.", ".fc2.": ".2.", ".ln.": ".3."}
_BANKS = ("text_moe", "vision_moe")
PaddleNames = Literal["ernie.", "ernie. before the tower too", "bare resampler"]


def hub_tensors(reference: Any) -> dict[str, Array]:
    """Every tensor under its published name: of both banks together, routers [h, E]."""
    config, state = reference.config.text_config, reference.state_dict()
    stored: dict[str, Array] = {}
    for name, values in ((name, values.float().numpy()) for name, values in state.items()):
        if name == "lm_head.weight":
            if not reference.config.tie_word_embeddings:
                stored[name] = values
        elif name.startswith("model.vision_tower."):
            stored[name.replace("model.vision_tower.", "vision_model.")] = values
        elif name.startswith("model.resampler_model."):
            for part, number in _PARTS.items():
                name = name.replace(part, number)
            stored[name] = values
        elif "_moe." not in name:
            stored[name.replace("model.language_model.", "model.")] = values
    for index, kind in enumerate(config.mlp_layer_types):
        if kind == "sparse":
            stored |= _experts(state, index, config.moe_num_experts)
    return stored


def _experts(state: Mapping[str, Any], layer: int, num_experts: int) -> dict[str, Array]:
    theirs, ours = f"model.language_model.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    stored: dict[str, Array] = {}
    corrections = []
    for first, bank, gate in zip((0, num_experts), _BANKS, ("gate.weight", "gate.weight_1"), strict=True):
        own = {
            name.removeprefix(f"{theirs}{bank}."): values.numpy()
            for name, values in state.items()
            if name.startswith(f"{theirs}{bank}.")
        }
        stored[ours + gate] = own["gate.weight"].T
        corrections.append(own["gate.moe_statics.e_score_correction_bias"])
        for number in range(num_experts):
            expert = f"{ours}experts.{first + number}."
            gate_proj, up_proj = np.split(own["experts.gate_up_proj"][number], 2)
            stored[f"{expert}gate_proj.weight"] = gate_proj
            stored[f"{expert}up_proj.weight"] = up_proj
            stored[f"{expert}down_proj.weight"] = own["experts.down_proj"][number]
    stored[f"{ours}moe_statics.e_score_correction_bias"] = np.concatenate(corrections)
    return stored


def hub_config(reference: Any) -> dict[str, Any]:
    """config.json as published: flat, with pairs where the banks differ, and remote code named."""
    config = reference.config
    text, vision = config.text_config, config.vision_config
    sparse = [index for index, kind in enumerate(text.mlp_layer_types) if kind == "sparse"]
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "use_bias", "moe_k", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        **{key: getattr(text, key) for key in same},
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig",
            "AutoModelForCausalLM": "modeling_ernie4_5_vl.Ernie4_5_VLMoeForConditionalGeneration",
            "AutoProcessor": "processing_ernie4_5_vl.Ernie4_5_VLProcessor",
        },
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_3d": True,
        "freq_allocation": text.rope_parameters["mrope_section"][2],
        "im_patch_id": config.image_token_id,
        "moe_num_experts": [text.moe_num_experts] * 2,
        "moe_intermediate_size": list(text.moe_intermediate_size),
        "moe_num_shared_experts": text.moe_num_shared_experts or None,
        "moe_layer_start_index": [sparse[0]] * 2,
        "moe_layer_end_index": [text.num_hidden_layers + 1, text.num_hidden_layers],
        "moe_layer_interval": 1,
        "moe_capacity": [128, 128, 128],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
        "pixel_hidden_size": vision.hidden_size,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "num_nextn_predict_layers": 0,
        "use_cache": True,
        "vision_config": {
            "attn_implementation": "eager",
            "depth": vision.depth,
            "embed_dim": vision.hidden_size,
            "hidden_act": "quick_gelu",
            "hidden_size": vision.hidden_size,
            "in_channels": 3,
            "mlp_ratio": vision.intermediate_size // vision.hidden_size,
            "model_type": "DFNRope_vision_transformer",
            "num_heads": vision.num_heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    }


def write_hub(folder: Path, reference: Any, *, num_shards: int = 1) -> Path:
    return write_stored(folder, hub_tensors(reference), hub_config(reference), num_shards=num_shards)


def write_paddle(
    folder: Path, reference: Any, *, names: PaddleNames = "ernie.", dtype: FloatDtype = "F32", num_shards: int = 1
) -> Path:
    """As Baidu's Paddle code writes it: fused, every linear weight [in, out]; routers as the hub has them."""
    config = {key: value for key, value in hub_config(reference).items() if key not in ("torch_dtype", "auto_map")}
    stored: dict[str, Array] = {}
    trunk: dict[str, Array] = {}
    for name, values in hub_tensors(reference).items():
        if name.startswith("vision_model."):
            prefix = "ernie." if names == "ernie. before the tower too" else ""
            stored[prefix + name] = values.T if values.ndim == 2 else values
        elif name.startswith("model.resampler_model."):
            key = name.replace("model.", "" if names == "bare resampler" else "ernie.", 1)
            stored[key] = values.T if values.ndim == 2 else values
        elif ".mlp.gate.weight" in name:
            stored[name.replace("model.", "ernie.", 1)] = values
        else:
            trunk[name] = values
    stored |= lay_out(trunk, config, "paddle")
    return write_stored(folder, stored, {**config, "paddleformers_version": "0.1"}, dtype=dtype, num_shards=num_shards)
