"""The config.json of text models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.spec import ExpertSpec, parse_spec

CONFIG: dict[str, Any] = {
    "model_type": "ernie4_5",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def config_error(**entries: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_spec({**CONFIG, **entries})
    assert caught.value.hint
    return caught.value


def test_the_published_config(shared_data: Path) -> None:
    config = json.loads((shared_data / "ERNIE-4.5-0.3B-PT" / "config.json").read_text())
    spec = parse_spec(config)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_layers, spec.vocab_size) == (1024, 3072, 18, 103424)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (16, 2, 128)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.max_context_tokens) == (500000.0, 1e-5, 131072)
    assert (spec.use_bias, spec.tied, spec.dtype) == (False, True, "bfloat16")
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert spec.unknown_keys == ()
    assert spec.kv_values_per_token * 2 == 18_432  # bytes a token in bf16: 2 · 18 layers · 2 heads · 128 · 2


def test_a_config_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import Ernie4_5Config

    written = Ernie4_5Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        use_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=[2, 7],
        dtype="float16",
    )
    written.save_pretrained(tmp_path)
    spec = parse_spec(json.loads((tmp_path / "config.json").read_text()))
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 4, 1, 32)
    assert (spec.rope_theta, spec.dtype, spec.eos_token_ids) == (10000.0, "float16", (2, 7))
    assert (spec.tied, spec.use_bias) == (False, True)
    assert spec.unknown_keys == ()
    assert parse_spec(written.to_dict()).unknown_keys == ()


@pytest.mark.parametrize("entries", [{}, {"head_dim": None}])
def test_without_a_head_dim_it_follows_from_the_heads(entries: dict[str, Any]) -> None:
    assert parse_spec({**CONFIG, **entries}).head_dim == 16
    assert parse_spec({**CONFIG, "head_dim": 48}).head_dim == 48


def test_what_absent_keys_mean() -> None:
    spec = parse_spec({**CONFIG, "num_key_value_heads": None})
    assert spec.num_kv_heads == 4
    assert (spec.rms_norm_eps, spec.rope_theta, spec.max_context_tokens) == (1e-5, 500000.0, 131072)
    assert (spec.use_bias, spec.tied, spec.dtype) == (False, None, None)
    assert (spec.bos_token_id, spec.eos_token_ids) == (None, ())
    assert (spec.experts, spec.num_mtp_layers) == (None, 0)


def test_dtype_goes_before_torch_dtype() -> None:
    assert parse_spec({**CONFIG, "dtype": "float32", "torch_dtype": "float16"}).dtype == "float32"
    assert "'float8'" in config_error(torch_dtype="float8").message


NEUTRAL = [
    ("hidden_act", "silu", "gelu"),
    ("rope_scaling", None, {"type": "linear", "factor": 2}),
    ("compression_ratio", 1.0, 2.0),
    ("scale_qk_coeff", 1.0, 2.0),
    ("use_rmsnorm", True, False),
    ("sliding_window", None, 4096),
    ("attention_bias", False, True),
    ("mlp_bias", False, True),
    ("add_tail_layers", 0, 2),
    ("is_encoder_decoder", False, True),
    ("add_cross_attention", False, True),
    ("moe_gate", "topk", "top2"),
    ("moe_gate_act", "softmax", "sigmoid"),
    ("moe_norm_gate_logits", True, False),
    ("moe_use_hard_gate", False, True),
    ("moe_group_experts", False, True),
]


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
        {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "num_experts": 4},
        {"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2, "num_experts_per_tok": 1},
    ],
    ids=["rope_theta", "num_experts", "moe_k"],
)
def test_two_names_for_one_thing_may_not_disagree(entries: dict[str, Any]) -> None:
    assert "they name the same thing" in config_error(**entries).hint


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_beyond_floating_point_is_refused(key: str) -> None:
    assert "too large" in config_error(**{key: 10**400}).hint


@pytest.mark.parametrize(("key", "neutral", "other"), NEUTRAL, ids=[key for key, _, _ in NEUTRAL])
def test_a_neutral_key_may_have_its_value_and_no_other(key: str, neutral: object, other: object) -> None:
    assert parse_spec({**CONFIG, key: neutral}).unknown_keys == ()
    error = config_error(**{key: other})
    assert key in error.message
    assert repr(other) in error.message


EXPERTS: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 32,
}


def experts_of(**entries: Any) -> ExpertSpec:
    experts = parse_spec({**CONFIG, **EXPERTS, **entries}).experts
    assert experts is not None
    return experts


@pytest.mark.parametrize(("key", "neutral", "other"), NEUTRAL, ids=[key for key, _, _ in NEUTRAL])
def test_a_neutral_key_counts_for_experts_as_well(key: str, neutral: object, other: object) -> None:
    experts_of(**{key: neutral})
    assert key in config_error(**{**EXPERTS, key: other}).message


def test_the_experts_of_a_config() -> None:
    written = {
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 2,
        "moe_norm_min": 1e-6,
        "moe_use_aux_free": True,
    }
    experts = experts_of(**written)
    assert (experts.num_experts, experts.experts_per_token, experts.intermediate_size) == (64, 6, 32)
    assert (experts.num_shared_experts, experts.norm_min, experts.has_correction_bias) == (2, 1e-6, True)
    assert (experts.first_layer, experts.last_layer, experts.layer_interval) == (1, 1, 2)


def test_what_absent_expert_keys_mean() -> None:
    experts = experts_of(moe_num_shared_experts=None, moe_layer_end_index=None)
    assert (experts.num_shared_experts, experts.first_layer, experts.last_layer, experts.layer_interval) == (0, 0, 2, 1)
    assert (experts.norm_min, experts.has_correction_bias) == (1e-12, True)
    assert experts_of(moe_layer_end_index=-1).last_layer == 2
    assert experts_of(moe_layer_end_index=99).last_layer == 2


@pytest.mark.parametrize(
    ("entries", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"moe_layer_start_index": 3}, [3, 4, 5]),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 4}, [1, 2, 3, 4]),
        ({"moe_layer_interval": 2}, [1, 3, 5]),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4}, [3]),
        ({"moe_layer_interval": 7}, []),
    ],
)
def test_which_layers_have_experts(entries: dict[str, Any], layers: list[int]) -> None:
    experts = experts_of(num_hidden_layers=6, **entries)
    assert [layer for layer in range(6) if experts.in_layer(layer)] == layers


def test_a_config_with_experts_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import Ernie4_5_MoeConfig

    settings = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_num_shared_experts": 1}
    written = Ernie4_5_MoeConfig(num_hidden_layers=5, moe_layer_start_index=2, **settings)
    written.save_pretrained(tmp_path)
    for config in (json.loads((tmp_path / "config.json").read_text()), written.to_dict()):
        spec = parse_spec(config)
        assert spec.unknown_keys == ()
        assert spec.experts is not None
        assert (spec.experts.num_experts, spec.experts.experts_per_token, spec.experts.intermediate_size) == (8, 3, 24)
        assert (spec.experts.num_shared_experts, spec.experts.first_layer, spec.experts.last_layer) == (1, 2, 4)


def test_erniekit_writes_dense_models_as_ones_of_no_experts(shared_fixtures: Path) -> None:
    folder = shared_fixtures / "paddle"
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("dense-erniekit", "dense")]
    assert (configs[0]["model_type"], configs[0]["moe_num_experts"]) == ("ernie4_5_moe", None)
    assert [parse_spec(config).model_type for config in configs] == ["ernie4_5", "ernie4_5"]
    specs = [replace(parse_spec(config), dtype=None) for config in configs]
    assert specs[0] == specs[1]
    assert parse_spec({**CONFIG, **EXPERTS, "moe_num_experts": 0}).experts is None
    assert parse_spec({**CONFIG, **EXPERTS, "head_dim": None}).head_dim == 16


EXPERT_NONSENSE: list[tuple[str, object]] = [
    ("moe_num_experts", -1),
    ("moe_num_experts", [64, 64]),  # the two banks of a vision model
    ("moe_num_experts", True),
    ("moe_k", 0),
    ("moe_k", 65),
    ("moe_intermediate_size", 0),
    ("moe_num_shared_experts", -2),
    ("moe_num_shared_experts", 1.0),
    ("moe_layer_start_index", [1, 1]),
    ("moe_layer_start_index", False),
    ("moe_layer_end_index", -2),
    ("moe_layer_end_index", 2.0),
    ("moe_layer_interval", 0),
    ("moe_norm_min", -1e-12),
    ("moe_norm_min", float("nan")),
    ("moe_use_aux_free", 1),
    ("num_nextn_predict_layers", -1),
]


@pytest.mark.parametrize(("key", "value"), EXPERT_NONSENSE, ids=[f"{key}={value!r}" for key, value in EXPERT_NONSENSE])
def test_a_nonsense_value_of_experts_is_named_with_its_key(key: str, value: object) -> None:
    message = config_error(**{**EXPERTS, key: value}).message
    assert key in message
    assert str(value) in message


def test_a_missing_expert_key_is_named() -> None:
    for key in ("moe_num_experts", "moe_intermediate_size"):
        entries = {name: value for name, value in {**CONFIG, **EXPERTS}.items() if name != key}
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            parse_spec(entries)


@pytest.mark.parametrize(
    ("entries", "shown"),
    [
        ({"num_attention_heads": 10**9, "num_key_value_heads": 10**9, "head_dim": 8}, "num_attention_heads 1000000000"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1, "head_dim": 8}, "2147483647 x 2147483647"),
        ({"head_dim": 2**30, "num_attention_heads": 2**14}, "x 64"),
        ({**EXPERTS, "moe_num_shared_experts": 2**30, "moe_intermediate_size": 2**30}, f"{2**60} x 64"),
    ],
)
def test_numbers_beyond_any_model_are_refused(entries: dict[str, Any], shown: str) -> None:
    assert shown in config_error(**entries).message


def test_unknown_keys_are_collected_in_order() -> None:
    spec = parse_spec({**CONFIG, "zeta": 1, "attention_sink": None, "use_cache": False, "architectures": ["X"]})
    assert spec.unknown_keys == ("attention_sink", "zeta")


@pytest.mark.parametrize("model_type", ["llama", "ernie", None, ["ernie4_5"]])
def test_another_model_type_is_not_ernie(model_type: object) -> None:
    error = config_error(model_type=model_type)
    assert repr(model_type) in error.message
    assert "not ERNIE 4.5" in error.message


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
    ],
)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing") as caught:
        parse_spec({name: value for name, value in CONFIG.items() if name != key})
    assert caught.value.hint


NONSENSE: list[tuple[str, object]] = [
    ("hidden_size", 0),
    ("hidden_size", -64),
    ("hidden_size", 64.0),
    ("hidden_size", "64"),
    ("hidden_size", True),
    ("num_hidden_layers", 2**40),
    ("num_key_value_heads", 3),  # does not divide the 4 heads
    ("head_dim", 15),
    ("head_dim", 0),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", float("nan")),
    ("rope_theta", -1.0),
    ("rope_theta", float("inf")),
    ("use_bias", "false"),
    ("tie_word_embeddings", 1),
    ("bos_token_id", "<s>"),
    ("eos_token_id", [2, 3.5]),
    ("eos_token_id", True),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE, ids=[f"{key}={value!r}" for key, value in NONSENSE])
def test_a_nonsense_value_is_named_with_its_key(key: str, value: object) -> None:
    error = config_error(**{key: value})
    assert {"num_key_value_heads": "num_key_value_heads 3", "head_dim": "head_dim"}.get(key, key) in error.message
    assert (str(value) if isinstance(value, (int, float)) else repr(value)) in error.message


def test_more_heads_than_widths_leave_no_head_dim() -> None:
    assert "head_dim is 0" in config_error(hidden_size=2).message


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0},
        {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5},
        {"mrope_section": [22, 22, 20]},
        "default",
    ],
)
def test_other_rotary_embeddings_are_refused(parameters: object) -> None:
    assert "rope_parameters" in config_error(rope_parameters=parameters).message


def test_where_rope_theta_stands() -> None:
    assert parse_spec({**CONFIG, "rope_theta": 10000}).rope_theta == 10000.0
    both = {"rope_theta": 20000, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    assert parse_spec({**CONFIG, **both}).rope_theta == 20000.0
    assert parse_spec({**CONFIG, "rope_parameters": {"rope_type": "default"}, "rope_theta": 7}).rope_theta == 7.0
