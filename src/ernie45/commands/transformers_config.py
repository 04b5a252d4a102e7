"""config.json as transformers 5 reads it, from a ModelSpec."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ernie45.errors import UnsupportedError
from ernie45.spec import DtypeName, ExpertSpec, ModelSpec

_CLASSES = {"ernie4_5": "Ernie4_5ForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM"}


def transformers_config(spec: ModelSpec, *, tied: bool, dtype: DtypeName, pad_token_id: int | None) -> dict[str, Any]:
    """The config.json of a -PT folder for `Ernie4_5ForCausalLM` or `Ernie4_5_MoeForCausalLM` of transformers 5.

    `tied`: the folder has no output head of its own. `dtype` is that of the stored weights.
    """
    eos = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "architectures": [_CLASSES[spec.model_type]],
        "model_type": spec.model_type,
        "dtype": dtype,
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
    if spec.experts is not None:
        config |= _expert_fields(spec.experts)
    if spec.num_mtp_layers:
        config["num_nextn_predict_layers"] = spec.num_mtp_layers
    return dict(sorted(config.items()))


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
    if experts.has_correction_bias is not None:
        fields["moe_use_aux_free"] = experts.has_correction_bias
    return fields
