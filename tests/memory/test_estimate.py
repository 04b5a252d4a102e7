from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45.backends.base import BuildOptions
from ernie45.backends.text import build_text
from ernie45.backends.vision_language import build_vision_language
from ernie45.catalogue import find
from ernie45.checkpoint.headers import read_headers
from ernie45.errors import TensorError
from ernie45.memory.estimate import estimate_sites, stored_weights
from ernie45.presets import PRESETS, QuantPreset, WeightPart
from ernie45.spec import ModelSpec, parse_spec
from ernie45.types.placement import Placement

MIXED = QuantPreset(name="mixed", experts="int4", linear=None, embedding="int8")
ALL_PRESETS = [*PRESETS.values(), MIXED]


class AnySource:
    """Has every tensor that is asked for, but biases of routed experts and of the head, and maybe the head."""

    def __init__(self, has_own_head: bool) -> None:
        self._has_own_head = has_own_head

    def __contains__(self, name: object) -> bool:
        return name == "lm_head.weight" and self._has_own_head

    def read_into(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        assert out.shape[0] == sum(parts.values())


def spec_of(name: str) -> ModelSpec:
    entry = find(name)
    assert entry is not None
    return entry.spec


def built(spec: ModelSpec, preset: QuantPreset, dtype: torch.dtype, has_own_head: bool) -> Mapping[WeightPart, int]:
    """What a build without weights counts."""
    options = BuildOptions(
        dtype=dtype, placement=Placement.on("meta", spec.num_layers), preset=preset, context_tokens=1
    )
    build = build_text if spec.vision is None else build_vision_language
    return build(spec, AnySource(has_own_head), options).weight_bytes


def check_against_build(spec: ModelSpec, preset: QuantPreset, dtype: torch.dtype, has_own_head: bool) -> None:
    estimated = estimate_sites(spec, preset, bytes_per_value=dtype.itemsize, has_own_head=has_own_head).total()
    assert estimated == Counter(built(spec, preset, dtype, has_own_head))


def random_spec(seed: int) -> ModelSpec:
    draw = random.Random(seed)
    config: dict[str, Any] = {
        "model_type": "ernie4_5_moe",
        "hidden_size": draw.choice([24, 40, 64, 96]),
        "intermediate_size": draw.choice([33, 56, 64]),
        "num_hidden_layers": draw.randint(1, 4),
        "num_attention_heads": 4,
        "num_key_value_heads": draw.choice([1, 2, 4]),
        "head_dim": draw.choice([6, 16, 32]),
        "vocab_size": draw.randint(30, 90),
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "use_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if draw.random() < 0.7:
        config |= {
            "moe_num_experts": draw.randint(2, 5),
            "moe_k": 2,
            "moe_intermediate_size": draw.choice([15, 32, 40]),
            "moe_num_shared_experts": draw.randint(0, 2),
            "moe_layer_start_index": draw.randint(0, 1),
            "moe_layer_interval": draw.randint(1, 2),
            "moe_use_aux_free": draw.random() < 0.5,
        }
    else:
        config["model_type"] = "ernie4_5"
    return parse_spec(config)


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=lambda preset: preset.name)
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-vl"])
def test_the_estimate_is_what_a_build_takes(name: str, preset: QuantPreset) -> None:
    for has_own_head in (False, True):
        check_against_build(spec_of(name), preset, torch.bfloat16, has_own_head)
    check_against_build(spec_of(name), preset, torch.float32, False)


@pytest.mark.parametrize("preset", ALL_PRESETS, ids=lambda preset: preset.name)
def test_it_is_for_odd_shapes_too(preset: QuantPreset) -> None:
    for seed in range(12):
        spec = random_spec(seed)
        check_against_build(spec, preset, random.Random(seed).choice([torch.float16, torch.float32]), not spec.tied)


@pytest.mark.parametrize(
    ("name", "num_params"),
    [("ERNIE-4.5-0.3B-PT", 360_748_032), ("ERNIE-4.5-21B-A3B-PT", 21_825_437_888),
     ("ERNIE-4.5-300B-A47B-PT", 299_484_163_264)],
)  # fmt: skip
def test_published_totals(name: str, num_params: int) -> None:
    spec = spec_of(name)
    parts = estimate_sites(spec, PRESETS["none"], bytes_per_value=2, has_own_head=not spec.tied).total()
    assert sum(parts.values()) == 2 * num_params + parts.get("router", 0) // 2  # the router is kept in float32


def test_int4_of_the_300b_by_hand() -> None:
    """54 layers, 51 of them with 64 experts of 3 · 8192 · 3584 weights: half a byte, a byte for 32, 4 for a row."""
    spec = spec_of("ERNIE-4.5-300B-A47B-PT")
    parts = estimate_sites(spec, PRESETS["int4"], bytes_per_value=2, has_own_head=True).total()
    num_experts, weights, rows = 51 * 64, 3 * 8192 * 3584, 2 * 3584 + 8192
    assert parts["routed_experts"] == num_experts * weights // 2
    assert parts["scales"] > num_experts * (weights // 32 + 4 * rows)
    assert (parts["routed_experts"] + num_experts * (weights // 32 + 4 * rows)) / (num_experts * weights) < 0.54
    assert parts["embedding"] == parts["head"] == 103424 * 8192


def test_the_estimate_takes_the_totals_that_a_build_found() -> None:
    spec = spec_of("tiny-moe")
    sites = estimate_sites(spec, PRESETS["int4"], bytes_per_value=2, has_own_head=False)
    assert sites.scaled_to(sites.total()) is sites
    exact: Counter[WeightPart] = Counter({**sites.total(), "scales": 99_999, "attention": 77_777, "head": 5})
    scaled = sites.scaled_to(exact)
    assert scaled.total() == exact
    assert [site["attention"] for site in scaled.layers] == [77_777 // 4] * 4


def test_what_one_token_goes_through() -> None:
    """2 of 8 experts of 3 · 256 · 128 values in each of the layers 1 to 3."""
    sites = estimate_sites(spec_of("tiny-moe"), PRESETS["none"], bytes_per_value=2, has_own_head=False)
    assert sites.active_experts == (0, *[2 * 3 * 256 * 128 * 2] * 3)
    assert [sum(site.values()) for site in sites.experts] == [0, *[8 * 3 * 256 * 128 * 2] * 3]


@pytest.mark.parametrize("shape", [[1, 5], [1, 5, 32, 8]])
def test_panels_of_another_shape_are_a_damaged_file(tmp_path: Path, shape: list[int]) -> None:
    save_file(
        {"model.layers.0.self_attn.o_proj.panels": torch.zeros(shape, dtype=torch.uint8)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(TensorError, match=r"o_proj\.panels' is stored as U8 \[1, 5.*no panels of 64 rows"):
        stored_weights(read_headers(tmp_path), bytes_per_value=2, has_own_head=False, gptq=None)
