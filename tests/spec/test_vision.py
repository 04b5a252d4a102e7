"""The config.json of vision-language models, in both writers' forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.spec import ExpertSpec, ModelSpec, parse_spec

# The 28B model as published, and as transformers converts it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig"},
    "model_type": "ernie4_5_moe_vl",
    "torch_dtype": "bfloat16",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_3d": True,
    "freq_allocation": 20,
    "tie_word_embeddings": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "im_patch_id": 100295,
    "pixel_hidden_size": 1280,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "use_temporal_conv": True,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_use_aux_free": True,
    "moe_use_hard_gate": True,
    "vision_config": {
        "model_type": "DFNRope_vision_transformer",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "attn_implementation": "eager",
    },
}
_MOVED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "use_bias", "moe_k",
    "moe_num_shared_experts", "moe_intermediate_size", "bos_token_id", "eos_token_id",
)  # fmt: skip
NATIVE: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_vl_moe",
    "dtype": "bfloat16",
    "image_token_id": 100295,
    "video_token_id": 103367,
    "tie_word_embeddings": True,
    "text_config": {
        **{key: PUBLISHED[key] for key in _MOVED},
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": 64,
        "moe_norm_min": 1e-12,
        "mlp_layer_types": ["dense"] + ["sparse"] * 27,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
        "pad_token_id": None,
    },
    "vision_config": {
        "model_type": "ernie4_5_vl_moe_vision",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_merge_size": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
}


def published(vision: dict[str, Any] | None = None, **entries: Any) -> ModelSpec:
    return parse_spec({**PUBLISHED, **entries, "vision_config": {**PUBLISHED["vision_config"], **(vision or {})}})


def native(vision: dict[str, Any] | None = None, **text: Any) -> ModelSpec:
    return parse_spec(
        {
            **NATIVE,
            "text_config": {**NATIVE["text_config"], **text},
            "vision_config": {**NATIVE["vision_config"], **(vision or {})},
        }
    )


def error_of(parse: Any, vision: dict[str, Any] | None = None, **entries: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(vision, **entries)
    assert caught.value.hint
    return caught.value


def banks(spec: ModelSpec) -> tuple[ExpertSpec, ExpertSpec]:
    assert spec.experts is not None
    assert spec.vision is not None
    return spec.experts, spec.vision.experts


def test_the_28b_model_in_both_forms() -> None:
    spec = published()
    text, pictures = banks(spec)
    assert spec.vision is not None
    assert (spec.hidden_size, spec.num_layers, spec.head_dim, spec.rope_theta) == (2560, 28, 128, 500000.0)
    assert (spec.tied, spec.dtype, spec.eos_token_ids, spec.unknown_keys) == (True, "bfloat16", (2,), ())
    assert (text.num_experts, text.experts_per_token, text.intermediate_size) == (64, 6, 1536)
    assert (text.first_layer, text.last_layer, text.layer_interval, text.num_shared_experts) == (1, 27, 1, 2)
    assert text.has_correction_bias
    assert pictures == replace(text, intermediate_size=512, num_shared_experts=0)
    tower = spec.vision
    assert (tower.num_layers, tower.hidden_size, tower.intermediate_size, tower.num_heads) == (32, 1280, 5120, 16)
    assert (tower.patch_size, tower.patch_values, tower.norm_eps, tower.rope_theta) == (14, 588, 1e-6, 10000.0)
    assert (tower.spatial_merge_size, tower.temporal_merge_size, tower.num_time_frequencies) == (2, 2, 20)
    assert native() == spec


def test_null_shared_experts_are_none() -> None:
    assert banks(published(moe_num_shared_experts=None))[0].num_shared_experts == 0
    assert banks(native(moe_num_shared_experts=0))[0].num_shared_experts == 0


def test_a_config_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import Ernie4_5_VLMoeConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]}
    written = Ernie4_5_VLMoeConfig(
        text_config={"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "rope_parameters": rope}
    )
    written.save_pretrained(tmp_path)
    for config in (json.loads((tmp_path / "config.json").read_text()), written.to_dict()):
        spec = parse_spec(config)
        assert spec.vision is not None
        assert (spec.unknown_keys, spec.vision.num_time_frequencies, spec.vision.hidden_size) == ((), 4, 1280)


def test_the_configs_that_erniekit_wrote(shared_fixtures: Path) -> None:
    for folder in ("vl", "vl/bf16"):
        spec = parse_spec(json.loads((shared_fixtures / "paddle" / folder / "config.json").read_text()))
        assert spec.unknown_keys == ()
        text, pictures = banks(spec)
        assert (text.intermediate_size, pictures.intermediate_size, text.num_experts) == (24, 16, 8)
        assert (text.first_layer, text.last_layer) == (pictures.first_layer, pictures.last_layer) == (1, 3)
        assert spec.vision is not None
        assert (spec.vision.num_time_frequencies, spec.vision.intermediate_size) == (4, 64)


# Which layers have experts


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("dssss", (1, 4, 1)),
        ("sssss", (0, 4, 1)),
        ("ddsss", (2, 4, 1)),
        ("dsssd", (1, 3, 1)),
        ("dsdsd", (1, 3, 2)),
        ("dsdsds", (1, 5, 2)),
        ("ddsdds", (2, 5, 3)),
        ("dddsd", (3, 3, 1)),
    ],
)
def test_layers_by_their_kinds(kinds: str, expected: tuple[int, int, int]) -> None:
    named = [{"d": "dense", "s": "sparse"}[kind] for kind in kinds]
    text, pictures = banks(native(num_hidden_layers=len(kinds), mlp_layer_types=named))
    assert (text.first_layer, text.last_layer, text.layer_interval) == expected
    for bank in (text, pictures):
        assert [bank.in_layer(layer) for layer in range(len(kinds))] == [kind == "s" for kind in kinds]


@pytest.mark.parametrize("kinds", ["sdsd", "ddsds", "dssds", "dddd"])
def test_layers_that_follow_no_interval_are_refused(kinds: str) -> None:
    named = [{"d": "dense", "s": "sparse"}[kind] for kind in kinds]
    error = error_of(native, num_hidden_layers=len(kinds), mlp_layer_types=named)
    assert str([i for i, kind in enumerate(kinds) if kind == "s"]) in error.message


@pytest.mark.parametrize("kinds", [["sparse"] * 27, ["sparse"] * 27 + ["moe"], "sparse", [1] * 28])
def test_kinds_that_are_not_one_for_each_layer(kinds: object) -> None:
    assert "mlp_layer_types" in error_of(native, mlp_layer_types=kinds).message


@pytest.mark.parametrize(
    "entries", [{"moe_layer_start_index": [1, 2]}, {"moe_layer_end_index": [27, 26]}, {"moe_layer_end_index": [-1, 5]}]
)
def test_banks_in_different_layers_are_refused(entries: dict[str, Any]) -> None:
    error = error_of(published, **entries)
    assert "text has experts in layers 1 to 27, pictures in" in error.message


def test_banks_of_different_numbers_are_refused() -> None:
    assert "moe_num_experts is 64 for text and 32 for pictures" in error_of(published, moe_num_experts=[64, 32]).message


@pytest.mark.parametrize("key", ["moe_num_experts", "moe_intermediate_size", "moe_layer_start_index"])
@pytest.mark.parametrize("value", [[1], [1, 1, 1], [], [8, "8"], [0.5, 1]])
def test_what_is_no_pair(key: str, value: list[Any]) -> None:
    changes: dict[str, Any] = {key: value}
    assert key in error_of(published, **changes).message


def test_one_number_goes_for_both_banks() -> None:
    assert published(moe_num_experts=64, moe_layer_start_index=1, moe_layer_end_index=-1) == published()


# Rotary embedding


@pytest.mark.parametrize(
    "section", [[22, 20, 22], [20, 20, 20], [44, 20], [22, 22, 20, 0], [22, 22, "20"], [0, 0, 64], [True, True, 62], 64]
)
def test_a_section_that_does_not_divide_the_heads(section: object) -> None:
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": section}
    assert "mrope_section" in error_of(native, rope_parameters=rope).message


def test_a_section_of_other_heads() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 24, 16]}
    spec = native(rope_parameters=rope)
    assert spec.vision is not None
    assert (spec.vision.num_time_frequencies, spec.rope_theta) == (16, 10000.0)
    error = error_of(native, rope_parameters=rope, head_dim=64)
    assert "holds 64 frequencies, and a head of 64 has 32" in error.message


@pytest.mark.parametrize("count", [64, 65, 1000])
def test_time_leaves_frequencies_to_height_and_width(count: int) -> None:
    error = error_of(published, freq_allocation=count)
    assert f"freq_allocation {count} leaves none of 64" in error.message


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 500000.0, "mrope_section": [22, 22, 20]},
        {"rope_type": "default", "rope_theta": 500000.0, "factor": 2.0, "mrope_section": [22, 22, 20]},
    ],
)
def test_other_rotary_embeddings_are_refused(rope: dict[str, Any]) -> None:
    assert "rope_parameters" in error_of(native, rope_parameters=rope).message


def test_another_rotary_embedding_of_the_tower_is_refused() -> None:
    error = error_of(native, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}})
    assert "vision_config.rope_parameters" in error.message
    spec = native({"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}})
    assert spec.vision is not None
    assert spec.vision.rope_theta == 300.0


# Other values


@pytest.mark.parametrize(("config", "inner"), [(PUBLISHED, None), (NATIVE, "x"), (PUBLISHED, []), (NATIVE, None)])
def test_without_a_tower_there_is_no_vision_language_model(config: dict[str, Any], inner: object) -> None:
    with pytest.raises(ConfigError, match="vision_config is missing"):
        parse_spec({**config, "vision_config": inner})
    with pytest.raises(ConfigError, match="vision_config is missing"):
        parse_spec({key: value for key, value in config.items() if key != "vision_config"})


def test_a_text_config_is_an_object() -> None:
    with pytest.raises(ConfigError, match="text_config is 'x'"):
        parse_spec({**NATIVE, "text_config": "x"})


@pytest.mark.parametrize("key", ["depth", "num_heads"])
def test_a_missing_key_of_the_tower_is_named(key: str) -> None:
    assert f"{key} is missing" in error_of(published, {key: None}).message
    assert (
        "vision_config.hidden_size is missing" in error_of(published, {"hidden_size": None, "embed_dim": None}).message
    )


@pytest.mark.parametrize("key", ["moe_num_experts", "moe_intermediate_size", "moe_k", "hidden_size"])
def test_a_missing_key_of_the_trunk_is_named(key: str) -> None:
    assert f"{key} is missing" in error_of(published, **{key: None}).message


@pytest.mark.parametrize(
    ("parse", "vision", "entries", "shown"),
    [
        (published, {"hidden_size": 1024}, {}, "embed_dim"),
        (published, {}, {"pixel_hidden_size": 1024}, "pixel_hidden_size is 1024"),
        (published, {"spatial_merge_size": 4}, {}, "spatial_conv_size is 2, but vision_config.spatial_merge_size is 4"),
        (published, {"spatial_merge_size": 4}, {"spatial_conv_size": 4}, "merges 4 x 4 patches of 2 frames"),
        (published, {}, {"temporal_conv_size": 1}, "merges 2 x 2 patches of 1 frames"),
        (native, {"temporal_merge_size": 4}, {}, "merges 2 x 2 patches of 4 frames"),
        (native, {"num_heads": 7}, {}, "vision_config.hidden_size 1280 does not divide into 7 heads"),
        (native, {"hidden_size": 96, "num_heads": 16}, {}, "of a multiple of 4"),
        (native, {"depth": -1}, {}, "depth is -1"),
        (native, {"patch_size": [14, 14]}, {}, "patch_size is [14, 14]"),
        (native, {"rms_norm_eps": 0}, {}, "rms_norm_eps is 0"),
        (published, {"mlp_ratio": 2.5}, {}, "mlp_ratio is 2.5"),
    ],
)
def test_what_does_not_fit_together(parse: Any, vision: dict[str, Any], entries: dict[str, Any], shown: str) -> None:
    assert shown in error_of(parse, vision, **entries).message


@pytest.mark.parametrize(
    ("vision", "entries"),
    [
        ({"hidden_size": 2**28, "embed_dim": 2**28}, {"pixel_hidden_size": None}),
        ({"intermediate_size": 2**30}, {}),
        ({"patch_size": 2**15}, {}),
        ({"mlp_ratio": 2**30}, {}),
        ({}, {"moe_intermediate_size": [1536, 2**30]}),
        ({}, {"moe_num_experts": 2**30}),
        ({}, {"vocab_size": 2**31 - 1}),
    ],
)
def test_numbers_beyond_any_model_are_refused(vision: dict[str, Any], entries: dict[str, Any]) -> None:
    error_of(published, vision, **entries)


@pytest.mark.parametrize(
    ("vision", "entries", "key"),
    [
        ({}, {"rope_3d": False}, "rope_3d"),
        ({}, {"use_temporal_conv": False}, "use_temporal_conv"),
        ({}, {"moe_use_hard_gate": False}, "moe_use_hard_gate"),
        ({}, {"moe_use_token_type_bias": True}, "moe_use_token_type_bias"),
        ({}, {"cachekv_quant": True}, "cachekv_quant"),
        ({}, {"moe_gate_act": "sigmoid"}, "moe_gate_act"),
        ({}, {"compression_ratio": 2.0}, "compression_ratio"),
        ({"hidden_act": "gelu"}, {}, "vision_config.hidden_act"),
        ({"attn_sep": True}, {}, "vision_config.attn_sep"),
    ],
)
def test_a_neutral_key_may_have_no_other_value(vision: dict[str, Any], entries: dict[str, Any], key: str) -> None:
    assert f"config.json: {key} is" in error_of(published, vision, **entries).message


def test_unknown_keys_are_named_with_where_they_stand() -> None:
    assert published({"window": 8}, zeta=1, sink=2).unknown_keys == ("sink", "zeta", "vision_config.window")
    assert native({"window": 8}, zeta=1).unknown_keys == ("zeta", "vision_config.window")


def test_keys_of_pictures_are_unknown_in_a_text_model() -> None:
    config = {
        "model_type": "ernie4_5",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 200,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "freq_allocation": 20,
        "vision_config": {},
    }
    spec = parse_spec(config)
    assert (spec.vision, spec.unknown_keys) == (None, ("freq_allocation", "vision_config"))


def test_pictures_have_three_channels() -> None:
    assert "in_channels" in error_of(published, {"in_channels": 4}).message


def test_two_words_on_time_must_agree_and_unknown_rotations_are_refused() -> None:
    assert "freq_allocation" in error_of(native, freq_allocation=3).message
    rope = {"rope_type": "axial", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "rope_parameters" in error_of(native, {"rope_parameters": rope}).message
