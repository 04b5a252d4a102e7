"""ModelSpec: what a checkpoint's config.json says about the mathematics, strictly read.

Config keys come in three classes. *Read* keys become fields. *Neutral* keys do not change what we compute as long as
they have the value listed here; another value is an error, because ignoring it would give wrong tokens. Everything
else is *unknown* and ends up in `ModelSpec.unknown_keys`, which the load report warns about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ernie45.errors import ConfigError, InvalidRequestError
from ernie45.types.requests import Sampling

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

_READ = {
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "use_bias",
    "tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "num_nextn_predict_layers",
}  # fmt: skip

_READ_OF_EXPERTS = {
    "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "moe_use_aux_free",
    "num_experts", "num_experts_per_tok",
}  # fmt: skip

# The value (or values) at which a key changes nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "compression_ratio": (1,),
    "scale_qk_coeff": (1,),
    "use_rmsnorm": (True,),
    "sliding_window": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "add_tail_layers": (False, 0),
    "moe_gate": ("topk", None),
    "moe_gate_act": ("softmax",),
    "moe_norm_gate_logits": (True,),
    "moe_use_hard_gate": (False,),
    "moe_group_experts": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Bookkeeping and training settings: no value of theirs touches inference.
_WITHOUT_EFFECT = {
    "architectures", "auto_map", "transformers_version", "_name_or_path", "paddleformers_version", "source",
    "use_cache", "initializer_range", "attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout",
    "ignored_index", "weight_share_add_bias", "fuse_linear", "fuse_ln", "fuse_rms_norm", "fuse_rope", "fuse_swiglu",
    "token_balance_loss", "token_balance_seqlen", "return_dict", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_decoder", "pruned_heads",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "cls_token_id", "use_flash_attention",
    "enable_mtp_magic_send", "use_recompute_mtp", "multi_token_pred_lambda", "fuse_gate_detach_matmul",
    "global_aux_loss", "moe_aux_loss_lambda", "moe_orthogonal_loss_lambda", "moe_group_orthogonal_loss",
    "moe_z_loss_lambda", "moe_capacity", "moe_reverse_token_drop", "moe_dense_experts_token_type_id",
    "moe_multimodal_dispatch_use_allgather", "moe_all_to_all_dropout", "moe_group", "moe_use_size_all2all",
    "sinkhorn_2gate", "sinkhorn_temp", "output_router_logits", "router_aux_loss_coef",
    "quantization_config",  # opening a checkpoint refuses one that says anything
}  # fmt: skip

# Far above any model; what asks for more is refused before something is built by it.
_MAX_HEADS = 2**14
_MAX_MATRIX_VALUES = 2**40

_MODEL_TYPES_TO_COME = ("ernie4_5_moe_vl", "ernie4_5_vl_moe")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """The routed experts of a mixture-of-experts model.

    Layer i has them if `first_layer` <= i <= `last_layer` and (i + 1) is a multiple of `layer_interval`; the others
    have a dense MLP. `intermediate_size` is one expert's width. The shared experts are one MLP of
    `num_shared_experts` times that width, and `norm_min` is the least sum that the chosen probabilities are divided
    by. `has_correction_bias`: a tensor corrects the selection, unless the config says that there is none.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    num_shared_experts: int
    first_layer: int
    last_layer: int
    layer_interval: int
    norm_min: float
    has_correction_bias: bool

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"config.json: moe_k {self.experts_per_token} is more than moe_num_experts {self.num_experts}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )

    def in_layer(self, layer: int) -> bool:
        """Whether this layer has routed experts."""
        return self.first_layer <= layer <= self.last_layer and (layer + 1) % self.layer_interval == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The shape and constants of one model.

    `head_dim` is independent of `hidden_size / num_heads`. `tied` is the config's word on whether the output head is
    the embedding, None if it says nothing; the files decide (a stored `lm_head.weight` is used). `dtype` is the
    checkpoint's, None if the config says nothing. `experts` is None in a dense model. `num_mtp_layers` is how many
    multi-token-prediction layers the files may carry for speculative decoding; plain decoding does without.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    use_bias: bool
    tied: bool | None
    dtype: DtypeName | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    experts: ExpertSpec | None = None
    num_mtp_layers: int = 0
    unknown_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim {self.head_dim} is odd", hint="rotary embeddings need pairs")
        if self.num_heads > _MAX_HEADS:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is more than {_MAX_HEADS}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        widths = [self.vocab_size, self.intermediate_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim]
        if self.experts is not None:
            widths += [self.experts.num_experts, self.experts.intermediate_size]
            widths += [self.experts.intermediate_size * self.experts.num_shared_experts]
        if max(widths) * self.hidden_size > _MAX_MATRIX_VALUES:
            raise ConfigError(
                f"config.json describes a matrix of {max(widths)} x {self.hidden_size} (hidden_size) values",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds for one token: 2 · layers · kv heads · head_dim."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a text model's config: the published form, erniekit's, PaddleFormers' or transformers' own.

    A `model_type` of "ernie4_5_moe" without experts, which erniekit writes for dense models, gives a dense spec.

    Raises:
        ConfigError: another model type, a missing or senseless value, or a neutral key with another value.
    """
    model_type = config.get("model_type")
    if model_type not in ("ernie4_5", "ernie4_5_moe"):
        raise _unknown_model_type(model_type)
    _check_neutral(config)
    experts = _experts(config) if model_type == "ernie4_5_moe" else None
    hidden_size = _positive_int(config, "hidden_size")
    num_heads = _positive_int(config, "num_attention_heads")
    return ModelSpec(
        model_type="ernie4_5" if experts is None else "ernie4_5_moe",
        hidden_size=hidden_size,
        intermediate_size=_positive_int(config, "intermediate_size"),
        num_layers=_positive_int(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_positive_int(config, "num_key_value_heads", default=num_heads),
        head_dim=_positive_int(config, "head_dim", default=hidden_size // num_heads),
        vocab_size=_positive_int(config, "vocab_size"),
        max_context_tokens=_positive_int(config, "max_position_embeddings", default=131072),
        rms_norm_eps=_positive_float(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config),
        use_bias=_bool(config, "use_bias") or False,
        tied=_bool(config, "tie_word_embeddings"),
        dtype=_dtype(config),
        bos_token_id=_token_id(config, "bos_token_id"),
        eos_token_ids=_token_ids(config, "eos_token_id"),
        experts=experts,
        num_mtp_layers=_count(config, "num_nextn_predict_layers"),
        unknown_keys=tuple(sorted(set(config) - _READ - _READ_OF_EXPERTS - set(_NEUTRAL) - _WITHOUT_EFFECT)),
    )


def _experts(config: Mapping[str, Any]) -> ExpertSpec | None:
    """The expert fields. Where tensors would show a wrong default (first layer, shared experts), absent means none."""
    if "moe_num_experts" not in config and "num_experts" not in config:
        raise _missing("moe_num_experts")
    num_experts = _alias(config, "moe_num_experts", "num_experts")
    if not num_experts:  # null or 0
        return None
    num_layers = _positive_int(config, "num_hidden_layers")
    last_layer = config.get("moe_layer_end_index", -1)
    if last_layer is None or last_layer == -1:
        last_layer = num_layers - 1
    if isinstance(last_layer, bool) or not isinstance(last_layer, int) or last_layer < 0:
        raise ConfigError(
            f"config.json: moe_layer_end_index is {last_layer!r}", hint="it must be a layer's index, or -1 for the last"
        )
    return ExpertSpec(
        num_experts=_positive_int({"moe_num_experts": num_experts}, "moe_num_experts"),
        experts_per_token=_positive_int({"moe_k": _alias(config, "moe_k", "num_experts_per_tok")}, "moe_k"),
        intermediate_size=_positive_int(config, "moe_intermediate_size"),
        num_shared_experts=_count(config, "moe_num_shared_experts"),
        first_layer=_count(config, "moe_layer_start_index"),
        last_layer=min(last_layer, num_layers - 1),
        layer_interval=_positive_int(config, "moe_layer_interval", default=1),
        norm_min=_positive_float(config, "moe_norm_min", default=1e-12),
        # Silence means that there is one: a conversion that lost it would still answer fluently, and wrong.
        has_correction_bias=_bool(config, "moe_use_aux_free") is not False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What generation_config.json sets for calls that leave an option out; the published values where it is silent."""

    temperature: float = 0.8
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    eos_token_ids: tuple[int, ...] = ()


def parse_generation_defaults(config: Mapping[str, Any]) -> GenerationDefaults:
    """Read generation_config.json. `do_sample: false` means greedy, whatever temperature stands beside it.

    Raises:
        ConfigError: a value that no call could use.
    """
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    values: dict[str, Any] = {name: config[name] for name in (*names, "top_k") if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    if values.get("top_k") == -1:  # some writers' way to say that every token is kept
        values["top_k"] = 0
    try:
        Sampling(**values)
    except InvalidRequestError as error:
        raise ConfigError(f"generation_config.json: {error.message}", hint=error.hint) from error
    return GenerationDefaults(**values, eos_token_ids=_token_ids(config, "eos_token_id"))


def _unknown_model_type(model_type: object) -> ConfigError:
    if model_type in _MODEL_TYPES_TO_COME:
        return ConfigError(
            f"config.json: model_type {model_type!r} is not supported by this version of ernie45",
            hint="this version runs the text models, e.g. 'ERNIE-4.5-21B-A3B-PT'",
        )
    return ConfigError(
        f"config.json: model_type {model_type!r} is not ERNIE 4.5",
        hint="ernie45 runs model_type 'ernie4_5' and 'ernie4_5_moe'; check that the folder holds the model you mean",
    )


def _check_neutral(config: Mapping[str, Any]) -> None:
    for key, allowed in _NEUTRAL.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"config.json: {key} is {config[key]!r}, and ernie45 only computes {key} = {wanted}",
                hint="another value would change every answer; please report the checkpoint that has it",
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
    return _positive_float({"rope_theta": _alias(both, "rope_theta", inner)}, "rope_theta")


def _dtype(config: Mapping[str, Any]) -> DtypeName | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    for known in DTYPE_NAMES:
        if name == known:
            return known
    raise ConfigError(f"config.json: dtype {name!r} is unknown", hint=f"known are {', '.join(DTYPE_NAMES)}")


def _alias(config: Mapping[str, Any], key: str, other: str) -> object:
    """The value that stands under one of two keys, or under both; None where it is absent or null in both."""
    values = [config[name] for name in (key, other) if config.get(name) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ConfigError(
            f"config.json: {key} is {values[0]!r}, but {other} is {values[1]!r}",
            hint="they name the same thing: keep the one that the weights were trained with",
        )
    return values[0] if values else None


def _missing(key: str) -> ConfigError:
    return ConfigError(f"config.json: {key} is missing", hint="the file is incomplete; download it again")


def _positive_int(config: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise _missing(key)
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be a whole number above 0")
    return value


def _count(config: Mapping[str, Any], key: str) -> int:
    """A number that may be 0, which it also is where the key is absent or null."""
    value = config.get(key)
    if value is None or (value == 0 and not isinstance(value, bool)):
        return 0
    return _positive_int(config, key)


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} is {value!r:.100} in the checkpoint's config", hint="it must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{key} is {value!r:.100}… in the checkpoint's config", hint="it is too large") from None


def _positive_float(config: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    # Mostly without a default: the tensors' shapes show a wrong width, but nothing would show a wrong constant.
    if config.get(key) is None:
        if default is None:
            raise _missing(key)
        return default
    value = _number(config, key)
    if not 0 < value < float("inf"):
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be above 0")
    return value


def _bool(config: Mapping[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be true or false")
    return value


def _token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(
            f"{key} is {value!r} in the checkpoint's config", hint="it must be a token id or a list of them"
        )
    return tuple(ids)


def _token_id(config: Mapping[str, Any], key: str) -> int | None:
    ids = _token_ids(config, key)
    return ids[0] if ids else None
