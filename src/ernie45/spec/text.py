"""The text models' config.json, in every writer's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie45.errors import ConfigError
from ernie45.spec.keys import NEUTRAL, READ, READ_OF_EXPERTS, WITHOUT_EFFECT, check_neutral, unknown_keys
from ernie45.spec.shapes import DTYPE_NAMES, DtypeName, ExpertSpec, ModelSpec
from ernie45.spec.values import (
    alias,
    count,
    flag,
    missing,
    positive_float,
    positive_int,
    token_id,
    token_ids,
)

TEXT_MODEL_TYPES = ("ernie4_5", "ernie4_5_moe")


def parse_text(config: Mapping[str, Any]) -> ModelSpec:
    """Read a text model's config: the published form, erniekit's, PaddleFormers' or transformers' own.

    A `model_type` of "ernie4_5_moe" without experts, which erniekit writes for dense models, gives a dense spec.

    Raises:
        ConfigError: a missing or senseless value, or a neutral key with another value.
    """
    check_neutral(config, NEUTRAL)
    experts = parse_experts(config) if config["model_type"] == "ernie4_5_moe" else None
    return parse_trunk(
        config,
        model_type="ernie4_5" if experts is None else "ernie4_5_moe",
        experts=experts,
        unknown_keys=unknown_keys(config, READ, READ_OF_EXPERTS, NEUTRAL, WITHOUT_EFFECT),
    )


def parse_trunk(
    config: Mapping[str, Any], *, model_type: str, experts: ExpertSpec | None, unknown_keys: tuple[str, ...]
) -> ModelSpec:
    """What text and vision-language models share. Raises ConfigError."""
    hidden_size = positive_int(config, "hidden_size")
    num_heads = positive_int(config, "num_attention_heads")
    return ModelSpec(
        model_type=model_type,
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "intermediate_size"),
        num_layers=positive_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=positive_int(config, "num_key_value_heads", default=num_heads),
        head_dim=positive_int(config, "head_dim", default=hidden_size // num_heads),
        vocab_size=positive_int(config, "vocab_size"),
        max_context_tokens=positive_int(config, "max_position_embeddings", default=131072),
        rms_norm_eps=positive_float(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config),
        use_bias=flag(config, "use_bias") or False,
        tied=flag(config, "tie_word_embeddings"),
        dtype=_dtype(config),
        bos_token_id=token_id(config, "bos_token_id"),
        eos_token_ids=token_ids(config, "eos_token_id"),
        experts=experts,
        num_mtp_layers=count(config, "num_nextn_predict_layers"),
        unknown_keys=unknown_keys,
    )


def parse_experts(config: Mapping[str, Any]) -> ExpertSpec | None:
    """The expert fields. Where tensors would show a wrong default (first layer, shared experts), absent means none."""
    if "moe_num_experts" not in config and "num_experts" not in config:
        raise missing("moe_num_experts")
    num_experts = alias(config, "moe_num_experts", "num_experts")
    if not num_experts:  # null or 0
        return None
    num_layers = positive_int(config, "num_hidden_layers")
    last_layer = config.get("moe_layer_end_index", -1)
    if last_layer is None or last_layer == -1:
        last_layer = num_layers - 1
    if isinstance(last_layer, bool) or not isinstance(last_layer, int) or last_layer < 0:
        raise ConfigError(
            f"config.json: moe_layer_end_index is {last_layer!r}", hint="it must be a layer's index, or -1 for the last"
        )
    return ExpertSpec(
        num_experts=positive_int({"moe_num_experts": num_experts}, "moe_num_experts"),
        experts_per_token=positive_int({"moe_k": alias(config, "moe_k", "num_experts_per_tok")}, "moe_k"),
        intermediate_size=positive_int(config, "moe_intermediate_size"),
        num_shared_experts=count(config, "moe_num_shared_experts"),
        first_layer=count(config, "moe_layer_start_index"),
        last_layer=min(last_layer, num_layers - 1),
        layer_interval=positive_int(config, "moe_layer_interval", default=1),
        norm_min=positive_float(config, "moe_norm_min", default=1e-12),
        # Silence means that there is one: a conversion that lost it would still answer fluently, and wrong.
        has_correction_bias=flag(config, "moe_use_aux_free") is not False,
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """`rope_theta` stands at the top (published form) or in `rope_parameters` (transformers 5)."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters is {parameters!r}", hint="it must be an object")
    kind = parameters.get("rope_type", "default")
    unknown = set(parameters) - {"rope_type", "rope_theta"}
    if kind != "default" or unknown:
        raise ConfigError(
            f"config.json: rope_parameters {dict(parameters)!r} ask for something else than plain rotary embeddings",
            hint="ernie45 computes rope_type 'default' with rope_theta alone",
        )
    inner = "rope_parameters.rope_theta"
    both = {"rope_theta": config.get("rope_theta"), inner: parameters.get("rope_theta")}
    return positive_float({"rope_theta": alias(both, "rope_theta", inner)}, "rope_theta")


def _dtype(config: Mapping[str, Any]) -> DtypeName | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    for known in DTYPE_NAMES:
        if name == known:
            return known
    raise ConfigError(f"config.json: dtype {name!r} is unknown", hint=f"known are {', '.join(DTYPE_NAMES)}")
