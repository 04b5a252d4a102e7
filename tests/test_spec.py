from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.spec import parse_generation_defaults, parse_spec

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


def test_the_published_generation_config(shared_data: Path) -> None:
    config = json.loads((shared_data / "ERNIE-4.5-0.3B-PT" / "generation_config.json").read_text())
    defaults = parse_generation_defaults(config)
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.8, 0.8, 0, 0.0)
    assert (defaults.repetition_penalty, defaults.presence_penalty, defaults.frequency_penalty) == (1.0, 0.0, 0.0)
    assert defaults.eos_token_ids == (2,)


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
    assert (spec.use_bias, spec.tied, spec.dtype) == (False, None, "bfloat16")
    assert (spec.bos_token_id, spec.eos_token_ids) == (None, ())


def test_dtype_goes_before_torch_dtype() -> None:
    assert parse_spec({**CONFIG, "dtype": "float32", "torch_dtype": "float16"}).dtype == "float32"
    assert "'float8'" in config_error(torch_dtype="float8").message


NEUTRAL = [
    ("hidden_act", "silu", "gelu"),
    ("rope_scaling", None, {"type": "linear", "factor": 2}),
    ("compression_ratio", 1.0, 2.0),
    ("scale_qk_coeff", 1.0, 0.5),
    ("use_rmsnorm", True, False),
    ("sliding_window", None, 4096),
    ("attention_bias", False, True),
    ("mlp_bias", False, True),
    ("add_tail_layers", 0, 2),
    ("num_nextn_predict_layers", 0, 1),
    ("quantization_config", None, {"quant_method": "gptq"}),
    ("is_encoder_decoder", False, True),
    ("add_cross_attention", False, True),
]


@pytest.mark.parametrize(("key", "neutral", "other"), NEUTRAL, ids=[key for key, _, _ in NEUTRAL])
def test_a_neutral_key_may_have_its_value_and_no_other(key: str, neutral: object, other: object) -> None:
    assert parse_spec({**CONFIG, key: neutral}).unknown_keys == ()
    error = config_error(**{key: other})
    assert key in error.message
    assert repr(other) in error.message


def test_unknown_keys_are_collected_in_order() -> None:
    spec = parse_spec({**CONFIG, "zeta": 1, "attention_sink": None, "use_cache": False, "architectures": ["X"]})
    assert spec.unknown_keys == ("attention_sink", "zeta")


@pytest.mark.parametrize("model_type", ["llama", "ernie", None, ["ernie4_5"]])
def test_another_model_type_is_not_ernie(model_type: object) -> None:
    error = config_error(model_type=model_type)
    assert repr(model_type) in error.message
    assert "not ERNIE 4.5" in error.message


@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "ernie4_5_moe_vl", "ernie4_5_vl_moe"])
def test_a_sister_model_is_not_supported_yet(model_type: str) -> None:
    error = config_error(model_type=model_type)
    assert repr(model_type) in error.message
    assert "not supported by this version" in error.message


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
    both = {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    assert parse_spec({**CONFIG, **both}).rope_theta == 20000.0
    assert parse_spec({**CONFIG, "rope_parameters": {"rope_type": "default"}, "rope_theta": 7}).rope_theta == 7.0


def test_generation_defaults_are_the_published_ones_where_the_file_is_silent() -> None:
    defaults = parse_generation_defaults({"top_p": None, "max_length": 100})
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (0.8, 0.8, 0, 1.0)
    assert defaults.eos_token_ids == ()


def test_generation_defaults_of_the_file() -> None:
    entries = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "eos_token_id": [2, 9],
    }
    defaults = parse_generation_defaults(entries)
    values = {name: getattr(defaults, name) for name in entries if name != "eos_token_id"}
    assert values == {name: value for name, value in entries.items() if name != "eos_token_id"}
    assert defaults.eos_token_ids == (2, 9)


def test_do_sample_false_is_greedy_whatever_the_temperature() -> None:
    assert parse_generation_defaults({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert parse_generation_defaults({"do_sample": True, "temperature": 0.7}).temperature == 0.7


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("temperature", -0.5), ("top_p", 2), ("top_p", True), ("top_k", 2.5)]
)
def test_nonsense_in_generation_config_is_an_error_at_loading(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        parse_generation_defaults({key: value})
    assert str(value) in caught.value.message
    assert caught.value.hint
