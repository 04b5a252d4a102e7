"""The shapes of the published families, as the fields of their config.json, each with where it is known from.

A field is "published" where Baidu's files, code or pages, or transformers' defaults for the family, say it; "derived"
where it follows from a published number. Either way, what a checkpoint's own files say wins over this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperParameter:
    """One field of config.json: its value, whether it was `status` "published" or "derived", and the source."""

    name: str
    value: Any
    status: Literal["published", "derived"]
    source: str


def _published(source: str, **fields: Any) -> dict[str, HyperParameter]:
    return {
        name: HyperParameter(name=name, value=value, status="published", source=source)
        for name, value in fields.items()
    }


def _derived(source: str, **fields: Any) -> dict[str, HyperParameter]:
    return {
        name: HyperParameter(name=name, value=value, status="derived", source=source) for name, value in fields.items()
    }


_TRANSFORMERS = "transformers' defaults for the family"
_PRETRAINING = "Baidu's pre-training config"
_CARD = "the model card"
_CODE = "Baidu's training and serving code"
_LISTING = "the tensors of a 300B checkpoint, as listed by a third party"

_COMMON: dict[str, Any] = {
    "vocab_size": 103424, "max_position_embeddings": 131072, "rope_theta": 500000, "rms_norm_eps": 1e-5,
    "use_bias": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}  # fmt: skip

_03B = _published(
    "config.json of ERNIE-4.5-0.3B-Base-PT",
    model_type="ernie4_5", hidden_size=1024, intermediate_size=3072, num_hidden_layers=18, num_attention_heads=16,
    num_key_value_heads=2, head_dim=128, tie_word_embeddings=True, **_COMMON,
)  # fmt: skip

_TRUNK_21B: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": True, "moe_k": 6, "moe_num_shared_experts": 2,
    "moe_layer_interval": 1, "moe_use_aux_free": True, **_COMMON,
}  # fmt: skip

_21B = _published(
    f"{_TRANSFORMERS}; {_PRETRAINING}",
    model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=1536, moe_layer_start_index=1,
    moe_layer_end_index=27, **_TRUNK_21B,
) | _published(_CODE, num_nextn_predict_layers=1)  # fmt: skip

# The Hub's total of the Thinking release leaves no room for an MTP layer.
THINKING_21B = _derived("the published parameter total of 21B-A3B-Thinking", num_nextn_predict_layers=0)

_TRUNK_300B: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 54, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "moe_k": 8, "moe_layer_interval": 1,
}  # fmt: skip

_300B = _published(_TRANSFORMERS, **_COMMON) | _published(
    f"{_PRETRAINING}; {_CARD}",
    model_type="ernie4_5_moe", moe_num_experts=64, moe_intermediate_size=3584, moe_num_shared_experts=0,
    moe_layer_start_index=3, moe_layer_end_index=53, **_TRUNK_300B,
) | _derived(
    _LISTING, vocab_size=103424, tie_word_embeddings=False, moe_use_aux_free=True
) | _published(_CODE, num_nextn_predict_layers=1)  # fmt: skip

_VISION = _published(
    f"{_TRANSFORMERS}; {_CODE}",
    im_patch_id=100295, pixel_hidden_size=1280, rope_3d=True, freq_allocation=20, spatial_conv_size=2,
    temporal_conv_size=2, use_temporal_conv=True,
    vision_config={
        "model_type": "DFNRope_vision_transformer", "depth": 32, "embed_dim": 1280, "hidden_size": 1280,
        "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "in_channels": 3, "hidden_act": "quick_gelu",
        "spatial_merge_size": 2,
    },
) | _derived("no file was seen; counted as none", num_nextn_predict_layers=0)  # fmt: skip

_VL_28B = _VISION | _published(
    _TRANSFORMERS,
    model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_intermediate_size=[1536, 512],
    moe_layer_start_index=[1, 1], moe_layer_end_index=[29, 28], **_TRUNK_21B,
)  # fmt: skip

_VL_424B = _VISION | _published(_TRANSFORMERS, **_COMMON) | _derived(
    "300B-A47B, of which this is the trunk, and VL-28B-A3B for the picture tokens' experts",
    model_type="ernie4_5_moe_vl", moe_num_experts=[64, 64], moe_layer_start_index=[3, 3], moe_layer_end_index=[53, 53],
    moe_use_aux_free=True, tie_word_embeddings=False, **_TRUNK_300B,
) | _derived(
    "the published size of 424B", moe_intermediate_size=[3584, 1536], moe_num_shared_experts=0
)  # fmt: skip

_TINY: dict[str, Any] = {
    **_COMMON, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 2048,
    "max_position_embeddings": 4096, "rope_theta": 10000,
}  # fmt: skip
_OWN_CONFIG = "its config.json in this package"

_TINY_DENSE = _published(_OWN_CONFIG, model_type="ernie4_5", **_TINY)

_TINY_MOE = _published(
    _OWN_CONFIG,
    model_type="ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=128, moe_num_shared_experts=2,
    moe_layer_start_index=1, moe_layer_end_index=3, moe_layer_interval=1, moe_use_aux_free=True,
    num_nextn_predict_layers=1, **_TINY,
)  # fmt: skip

_TINY_VL = _published(
    _OWN_CONFIG,
    model_type="ernie4_5_moe_vl", moe_num_experts=[4, 4], moe_k=2, moe_intermediate_size=[128, 128],
    moe_num_shared_experts=2, moe_layer_start_index=[1, 1], moe_layer_end_index=[3, 3], moe_layer_interval=1,
    moe_use_aux_free=True, freq_allocation=10, spatial_conv_size=2, temporal_conv_size=2,
    vision_config={
        "depth": 4, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 4, "patch_size": 14, "in_channels": 3,
        "hidden_act": "quick_gelu", "spatial_merge_size": 2,
    },
    **_TINY,
)  # fmt: skip

# Family name -> field name -> field.
FAMILIES: Mapping[str, Mapping[str, HyperParameter]] = MappingProxyType(
    {
        "0.3B": _03B,
        "21B-A3B": _21B,
        "300B-A47B": _300B,
        "VL-28B-A3B": _VL_28B,
        "VL-424B-A47B": _VL_424B,
        "tiny-dense": _TINY_DENSE,
        "tiny-moe": _TINY_MOE,
        "tiny-vl": _TINY_VL,
    }
)
