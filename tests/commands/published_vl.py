"""A vision-language folder in the form Baidu publishes, from one that transformers wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def published_config(native: dict[str, Any]) -> dict[str, Any]:
    """transformers' config.json with the keys of the published one."""
    text, vision = native["text_config"], native["vision_config"]
    sparse = [index for index, kind in enumerate(text["mlp_layer_types"]) if kind == "sparse"]
    kept = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "use_bias", "moe_k", "bos_token_id",
        "eos_token_id", "pad_token_id", "moe_intermediate_size", "moe_num_shared_experts",
    )  # fmt: skip
    return {
        **{key: text[key] for key in kept},
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig"},
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": native["dtype"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "rope_3d": True,
        "freq_allocation": text["rope_parameters"]["mrope_section"][2],
        "im_patch_id": native["image_token_id"],
        "tie_word_embeddings": native["tie_word_embeddings"],
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": [sparse[0]] * 2,
        "moe_layer_end_index": [sparse[-1] + 2, sparse[-1] + 1],
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "pixel_hidden_size": vision["hidden_size"],
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            "depth": vision["depth"],
            "embed_dim": vision["hidden_size"],
            "hidden_size": vision["hidden_size"],
            "hidden_act": "quick_gelu",
            "in_channels": 3,
            "mlp_ratio": vision["intermediate_size"] // vision["hidden_size"],
            "num_heads": vision["num_heads"],
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    }


def as_published(native: Path, folder: Path) -> Path:
    """The same model with the published config and names: no `model.` before the vision tower's."""
    shutil.copytree(native, folder)
    config = published_config(json.loads((native / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(native / "model.safetensors")
    renamed = {name.replace("model.vision_model.", "vision_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder
