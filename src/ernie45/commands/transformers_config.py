"""config.json as transformers 5 reads it, from a ModelSpec."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ernie45.errors import UnsupportedError
from ernie45.spec import DtypeName, ExpertSpec, ModelSpec, VisionSpec

_CLASSES = {
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_moe_vl": "Ernie4_5_VLMoeForConditionalGeneration",
}
VISION_MODEL_TYPE = "ernie4_5_vl_moe"
"""What transformers calls a vision-language model."""


def transformers_config(
    spec: ModelSpec, *, tied: bool, dtype: DtypeName, pad_token_id: int | None, media_ids: Mapping[str, int]
) -> dict[str, Any]:
    """The config.json of a -PT folder for transformers 5: `Ernie4_5ForCausalLM`, `Ernie4_5_MoeForCausalLM` or
    `Ernie4_5_VLMoeForConditionalGeneration`.

    `tied`: the folder has no output head of its own. `dtype` is that of the stored weights. `media_ids` are the ids of
    media tokens by config key, which only a vision-language model has.

    Raises UnsupportedError for a rotary embedding that transformers cannot express.
    """
    config = _trunk(spec, tied=tied, pad_token_id=pad_token_id)
    head: dict[str, Any] = {"architectures": [_CLASSES[spec.model_type]], "dtype": dtype}
    if spec.vision is None:
        if spec.experts is not None:
            config |= _expert_fields(spec.experts)
        return dict(sorted((config | head | {"model_type": spec.model_type}).items()))
    return head | {
        "model_type": VISION_MODEL_TYPE,
        **media_ids,
        "tie_word_embeddings": tied,
        "text_config": dict(sorted((config | _two_bank_fields(spec, spec.vision)).items())),
        "vision_config": _tower_fields(spec.vision),
    }


def _trunk(spec: ModelSpec, *, tied: bool, pad_token_id: int | None) -> dict[str, Any]:
    eos = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_tokens,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "use_bias": spec.use_bias,
        "use_cache": True,
        "tie_word_embeddings": tied,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": pad_token_id,
    }
    if spec.num_mtp_layers:
        config["num_nextn_predict_layers"] = spec.num_mtp_layers
    return config


def check_transformers_holds(spec: ModelSpec, names: Collection[str]) -> None:
    """Refuse tensors that change the answers and that transformers' class of this config has no place for: it would
    open the folder, warn, and give wrong tokens.

    Raises:
        UnsupportedError: a model type, head bias or expert bias that transformers does not have.
    """
    if spec.model_type not in _CLASSES:
        raise UnsupportedError(
            f"model_type {spec.model_type!r} cannot be converted",
            hint=f"ernie45 converts {' and '.join(map(repr, _CLASSES))}",
        )
    class_name = _CLASSES[spec.model_type]
    has_head_bias = spec.model_type == "ernie4_5_moe" and spec.use_bias
    for name in names:
        if (name == "lm_head.bias" and not has_head_bias) or (".mlp.experts." in name and name.endswith(".bias")):
            raise UnsupportedError(
                f"the checkpoint has a tensor {name!r}, and transformers' {class_name} has no place for it",
                hint="without it every answer would change, so it is not converted; ernie45 runs the folder as it is",
            )


def _expert_fields(experts: ExpertSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "moe_num_experts": experts.num_experts,
        "moe_k": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "moe_num_shared_experts": experts.num_shared_experts,
        "moe_layer_start_index": experts.first_layer,
        "moe_layer_end_index": experts.last_layer,
        "moe_layer_interval": experts.layer_interval,
        "moe_norm_min": experts.norm_min,
    }
    fields["moe_use_aux_free"] = experts.has_correction_bias
    return fields


def _two_bank_fields(spec: ModelSpec, vision: VisionSpec) -> dict[str, Any]:
    """What differs from the text models' keys."""
    experts = spec.experts
    assert experts is not None
    of_plane, is_odd = divmod(spec.head_dim // 2 - vision.num_time_frequencies, 2)
    if is_odd:
        raise UnsupportedError(
            f"of {spec.head_dim // 2} rotary frequencies {vision.num_time_frequencies} turn with time, and "
            "transformers needs as many for height as for width",
            hint="it is not converted; ernie45 runs the folder as it is",
        )
    return {
        "model_type": f"{VISION_MODEL_TYPE}_text",
        "rope_parameters": {
            "rope_theta": spec.rope_theta,
            "rope_type": "default",
            "mrope_section": [of_plane, of_plane, vision.num_time_frequencies],
        },
        "moe_num_experts": experts.num_experts,
        "moe_k": experts.experts_per_token,
        "moe_intermediate_size": [experts.intermediate_size, vision.experts.intermediate_size],
        "moe_num_shared_experts": experts.num_shared_experts,
        "moe_norm_min": experts.norm_min,
        "moe_use_aux_free": experts.has_correction_bias,
        "mlp_layer_types": ["sparse" if experts.in_layer(layer) else "dense" for layer in range(spec.num_layers)],
    }


def _tower_fields(vision: VisionSpec) -> dict[str, Any]:
    return {
        "model_type": f"{VISION_MODEL_TYPE}_vision",
        "depth": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "hidden_act": "quick_gelu",
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "in_channels": vision.num_channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "temporal_merge_size": vision.temporal_merge_size,
        "rms_norm_eps": vision.norm_eps,
        "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "axial"},
    }
