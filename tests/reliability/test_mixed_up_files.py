"""Files and configs that do not belong together, or whose layout is unclear, are refused by name: loaded, they would
give wrong tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie45 import ErnieModel
from ernie45.errors import CheckpointError, ConfigError, TensorError
from tests.paddle_files import CONFIG, EXPERTS, Array, lay_out, random_pt, write_checkpoint, write_stored

MOE = {**CONFIG, **EXPERTS}
UNTIED = {**CONFIG, "tie_word_embeddings": False}
PADDLE = {"paddleformers_version": "0.1"}
PADDLEFORMERS = {"paddleformers_version": "1.2.0", "source": "paddle"}

Stored = dict[str, Array]


def load_error(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        ErnieModel.from_pretrained(folder, device="cpu", progress=False)
    assert caught.value.hint
    return caught.value


def check(folder: Path, stored: Stored, config: Mapping[str, Any], shown: tuple[str, ...]) -> None:
    error = load_error(write_stored(folder, stored, config))
    assert type(error) is TensorError
    for part in shown:
        assert part in error.message


def paddle(config: Mapping[str, Any] = CONFIG) -> Stored:
    return lay_out(random_pt(config), config, "paddle")


def paddleformers(config: Mapping[str, Any] = CONFIG) -> Stored:
    return lay_out(random_pt(config), config, "paddleformers")


def renamed(stored: Stored, old: str, new: str) -> Stored:
    return {key.replace(old, new, 1): values for key, values in stored.items()}


MIXED: list[tuple[str, Callable[[], Stored], dict[str, Any], tuple[str, ...]]] = [
    ("ernie. keys, source paddle", paddle, {**CONFIG, "source": "paddle"}, ("'ernie.'", '"source": "paddle"')),
    ("ernie. keys, PaddleFormers 1", paddle, {**CONFIG, "paddleformers_version": "1.2.0"}, ("'ernie.'", "1.2.0")),
    ("fused model. keys without source", paddleformers, CONFIG, ("qkv_proj", '"source": "paddle"')),
    ("fused model. keys, PaddleFormers 0", paddleformers, {**PADDLEFORMERS, **CONFIG, **PADDLE}, ("0.1",)),
    ("first layout renamed", lambda: renamed(paddle(), "ernie.", "model."), {**CONFIG, **PADDLE}, ("qkv_proj",)),
    (
        "first layout renamed, untied, with PaddleFormers' config",
        lambda: renamed(paddle(UNTIED), "ernie.", "model."),
        {**UNTIED, **PADDLEFORMERS},
        ("lm_head.weight", "[24, 50]"),
    ),
    (
        "second layout renamed, untied",
        lambda: renamed(paddleformers(UNTIED), "model.", "ernie."),
        {**UNTIED, **PADDLE},
        ("lm_head.weight", "[50, 24]"),
    ),
    (
        "both prefixes",
        lambda: {**paddle(), "model.norm.weight": random_pt(CONFIG)["model.norm.weight"]},
        {**CONFIG, **PADDLE},
        ("'ernie.'", "'model.'"),
    ),
    (
        "fused and separate",
        lambda: {**paddleformers(), **random_pt(CONFIG)},
        {**CONFIG, **PADDLEFORMERS},
        ("qkv_proj", "q_proj"),
    ),
    ("-PT names under ernie.", lambda: renamed(random_pt(CONFIG), "model.", "ernie."), CONFIG, ("ernie.layers.0",)),
    ("-PT tensors, source paddle", lambda: random_pt(CONFIG), {**CONFIG, **PADDLEFORMERS}, ("q_proj", "source")),
    (
        "a tied head the wrong way round, Paddle",
        lambda: {**paddle(), "lm_head.weight": paddle()["lm_head.weight"].T},
        {**CONFIG, **PADDLE},
        ("lm_head.weight", "[24, 50]", "[50, 24]"),
    ),
    (
        "a tied head the wrong way round, -PT",
        lambda: {**random_pt(CONFIG), "lm_head.weight": paddle()["lm_head.weight"].T},
        CONFIG,
        ("lm_head.weight", "[24, 50]", "[50, 24]"),
    ),
    (
        "an untied head that is missing, Paddle",
        lambda: {key: values for key, values in paddle(UNTIED).items() if key != "lm_head.weight"},
        {**UNTIED, **PADDLE},
        ("lm_head.weight",),
    ),
    ("an untied head that is missing, -PT", lambda: random_pt(CONFIG), UNTIED, ("lm_head.weight",)),
    ("no prefix at all", lambda: renamed(random_pt(CONFIG), "model.", ""), CONFIG, ("model.embed_tokens.weight",)),
    (
        "kv heads of another config",
        lambda: paddle({**CONFIG, "num_key_value_heads": 1}),
        {**CONFIG, **PADDLE},
        ("qkv_proj", "[24, 48]", "[24, 64]"),
    ),
]


@pytest.mark.parametrize(("stored", "config", "shown"), [case[1:] for case in MIXED], ids=[case[0] for case in MIXED])
def test_a_mix_up_of_layouts_is_refused(
    tmp_path: Path, stored: Callable[[], Stored], config: dict[str, Any], shown: tuple[str, ...]
) -> None:
    check(tmp_path, stored(), config, shown)


def without(stored: Stored, *parts: str) -> Stored:
    left = {key: values for key, values in stored.items() if not any(part in key for part in parts)}
    assert len(left) < len(stored)
    return left


def with_copy(stored: Stored, old: str, new: str) -> Stored:
    copies = {key.replace(old, new): values for key, values in stored.items() if old in key}
    assert copies
    return {**stored, **copies}


CORRECTION = "mlp.moe_statics.e_score_correction_bias"
SILENT = {key: value for key, value in MOE.items() if key != "moe_use_aux_free"}
EXPERT_MISTAKES: list[tuple[str, Callable[[Stored], Stored], dict[str, Any], tuple[str, ...]]] = [
    ("more experts in the config", dict, {**MOE, "moe_num_experts": 5}, ("gate.weight", "4", "5")),
    ("fewer experts in the config", dict, {**MOE, "moe_num_experts": 3}, ("gate.weight", "4", "3")),
    ("a missing expert", lambda t: without(t, "layers.2.mlp.experts.3."), MOE, ("layers.2.mlp.experts.3.",)),
    ("part of one", lambda t: without(t, "experts.1.down_proj"), MOE, ("layers.1.mlp.experts.1.down_proj",)),
    ("an extra expert", lambda t: with_copy(t, "2.mlp.experts.3.", "2.mlp.experts.4."), MOE, ("2.mlp.experts.4.",)),
    ("a promised correction", lambda t: without(t, "e_score"), MOE, (f"layers.1.{CORRECTION}",)),
    ("a correction too many", dict, {**MOE, "moe_use_aux_free": False}, (f"layers.1.{CORRECTION}",)),
    ("a correction of one layer, the last", lambda t: without(t, f"1.{CORRECTION}"), SILENT, (CORRECTION,)),
    ("a correction of one layer, the first", lambda t: without(t, f"2.{CORRECTION}"), SILENT, (CORRECTION,)),
    ("missing shared experts", lambda t: without(t, "shared_experts"), MOE, ("layers.1.mlp.shared_experts.",)),
    ("shared experts too many", dict, {**MOE, "moe_num_shared_experts": 0}, ("shared_experts",)),
    ("other shared experts", dict, {**MOE, "moe_num_shared_experts": 1}, ("shared_experts",)),
    ("an earlier first layer", dict, {**MOE, "moe_layer_start_index": 0}, ("layers.0.mlp.",)),
    ("a later first layer", dict, {**MOE, "moe_layer_start_index": 2}, ("layers.1.mlp.",)),
    ("an earlier last layer", dict, {**MOE, "moe_layer_end_index": 1}, ("layers.2.mlp.",)),
    ("another interval", dict, {**MOE, "moe_layer_interval": 2}, ("layers.2.mlp.",)),
    ("a dense config", dict, CONFIG | {"num_hidden_layers": 3}, ("layers.1.mlp.",)),
    ("another router width", dict, {**MOE, "hidden_size": 26}, ("embed_tokens", "26")),
]


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize(
    ("change", "config", "shown"), [case[1:] for case in EXPERT_MISTAKES], ids=[case[0] for case in EXPERT_MISTAKES]
)
def test_experts_that_do_not_fit_the_config_are_refused(
    tmp_path: Path,
    layout: str,
    change: Callable[[Stored], Stored],
    config: dict[str, Any],
    shown: tuple[str, ...],
) -> None:
    stored = paddle(MOE) if layout == "paddle" else random_pt(MOE)
    check(tmp_path, change(stored), {**config, **(PADDLE if layout == "paddle" else {})}, shown)


@pytest.mark.parametrize("layout", ["paddle", "paddleformers", "pt"])
@pytest.mark.parametrize("says", [0, 1])
@pytest.mark.parametrize("has", [False, True])
def test_a_multi_token_prediction_head_changes_nothing(tmp_path: Path, layout: Any, says: int, has: bool) -> None:
    plain = random_pt(MOE)
    head = {name: values for name, values in random_pt(MOE, mtp=True).items() if name.startswith("model.mtp_")}
    logits = []
    for name, tensors, config in [
        ("plain", plain, MOE),
        ("head", {**plain, **(head if has else {})}, {**MOE, "num_nextn_predict_layers": says}),
    ]:
        folder = write_checkpoint(tmp_path / name, tensors, config, layout=layout)
        with ErnieModel.from_pretrained(folder, device="cpu", progress=False) as model:
            logits.append(model.logits([3, 4, 5]))
            named = [tensor.name for tensor in model.load_report.ignored if ".mtp_" in tensor.name]
    assert torch.equal(logits[0], logits[1])
    assert len(named) == (len(lay_out(head, UNTIED, layout)) if has else 0)


def test_a_square_head_without_a_word_on_ties_is_refused(tmp_path: Path) -> None:
    """Paddle's tied head is [V, h] and its untied one [h, V]: where V is h, only the config tells them apart."""
    config = {**CONFIG, "vocab_size": 24, "tie_word_embeddings": False}
    stored = paddle(config)
    silent = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    check(tmp_path, stored, {**silent, **PADDLE}, ("lm_head.weight", "[24, 24]"))


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    stored = {**paddle(), "lm_head.weight": np.zeros((50, 23), np.float32)}
    check(tmp_path, stored, {**CONFIG, **PADDLE}, ("lm_head.weight", "[50, 23]", "[50, 24]"))


@pytest.mark.parametrize("layout", ["paddle", "paddleformers", "pt"])
def test_a_config_that_asks_for_other_mathematics_is_refused_before_the_weights(tmp_path: Path, layout: Any) -> None:
    for key, value in [("moe_gate_act", "sigmoid"), ("scale_qk_coeff", 2.0), ("moe_norm_gate_logits", False)]:
        error = load_error(write_checkpoint(tmp_path, random_pt(MOE), {**MOE, key: value}, layout=layout))
        assert type(error) is ConfigError
        assert key in error.message
