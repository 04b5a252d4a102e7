from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ernie45.catalogue import built_in_folder, find
from ernie45.checkpoint.headers import read_headers
from ernie45.parameters import ParameterCount, count_parameters, count_resampler, count_vision_tower
from ernie45.spec import ModelSpec, parse_spec

DENSE: dict[str, Any] = {
    "model_type": "ernie4_5",
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 50,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_intermediate_size": 5,
    "moe_num_shared_experts": 3,
    "moe_layer_start_index": 1,
}


def count(**entries: Any) -> ParameterCount:
    return count_parameters(parse_spec({**DENSE, **entries}))


def published(name: str) -> ParameterCount:
    entry = find(name)
    assert entry is not None
    return entry.parameters


def test_a_dense_model_by_hand() -> None:
    counted = count()
    assert counted.embedding == 50 * 10
    assert counted.attention == 3 * (10 * 24 + 2 * 10 * 12 + 24 * 10)
    assert counted.dense_mlp == 3 * (3 * 10 * 7)
    assert counted.norms == 3 * 2 * 10 + 10
    assert counted.total == 500 + 2160 + 630 + 70 == counted.active
    assert (counted.head, counted.routed_experts, counted.shared_experts, counted.router, counted.mtp) == (0,) * 5
    assert counted.stored_bytes == 2 * counted.total


def test_experts_by_hand() -> None:
    counted = count(**EXPERTS, moe_use_aux_free=True)
    assert counted.dense_mlp == 3 * 10 * 7
    assert counted.routed_experts == 2 * 8 * (3 * 10 * 5)
    assert counted.active_experts == 2 * 2 * (3 * 10 * 5)
    assert counted.shared_experts == 2 * (3 * 10 * 15)
    assert counted.router == counted.float32 == 2 * (8 * 10 + 8)
    assert counted.active == counted.total - counted.routed_experts + counted.active_experts
    assert counted.stored_bytes == 2 * (counted.total - counted.router) + 4 * counted.router
    assert count(**EXPERTS, moe_use_aux_free=False).router == 2 * (8 * 10)
    assert count(**EXPERTS, moe_layer_interval=3).routed_experts == counted.routed_experts // 2


def test_biases_of_attention_and_of_dense_and_shared_mlps_are_counted() -> None:
    without, biased = count(**EXPERTS), count(**EXPERTS, use_bias=True)
    assert biased.attention - without.attention == 3 * (24 + 12 + 12 + 10)
    assert biased.dense_mlp - without.dense_mlp == 7 + 7 + 10
    assert biased.shared_experts - without.shared_experts == 2 * (15 + 15 + 10)
    assert biased.total - without.total == 174 + 24 + 80


def test_an_untied_head_counts_and_the_embedding_beside_it_is_not_active() -> None:
    tied, untied = count(), count(tie_word_embeddings=False)
    assert untied.head == untied.embedding
    assert untied.total == tied.total + 500
    assert untied.active == tied.active


def test_mtp_layers_are_counted_apart() -> None:
    with_mtp = count(**EXPERTS, num_nextn_predict_layers=2)
    layer = 720 + 210 + 2 * 10  # attention, dense MLP, norms
    assert with_mtp.mtp == 2 * (layer + 20 * 10 + 2 * 10)
    assert with_mtp.total == count(**EXPERTS).total


# The figures of published checkpoints


def test_the_dense_model_of_03b() -> None:
    counted = published("ERNIE-4.5-0.3B-PT")
    assert counted.total == counted.active == 360_748_032
    assert counted.embedding == 105_906_176


def test_21b() -> None:
    counted = published("ERNIE-4.5-21B-A3B-PT")
    assert counted.total == 21_825_437_888  # as the Hub says of the Thinking release, like the next
    assert counted.float32 == 4_425_408
    assert counted.mtp == 123_217_920
    assert counted.active == 3_352_150_208
    assert published("ERNIE-4.5-21B-A3B-Thinking").mtp == 0


def test_300b() -> None:
    counted = published("ERNIE-4.5-300B-A47B-PT")
    assert counted.total == 299_484_163_264
    assert counted.total - counted.head == 298_636_913_856  # what it would be if it were tied
    assert counted.routed_experts == 287_494_373_376
    assert counted.mtp == 989_888_512
    assert round(counted.active / 1e9, 2) == 47.08


def test_vision_language_models() -> None:
    small, large = published("ERNIE-4.5-VL-28B-A3B-PT"), published("ERNIE-4.5-VL-424B-A47B-PT")
    assert small.vision_tower == large.vision_tower == 630_433_280
    assert (small.resampler, large.resampler) == (144_225_280, 173_072_384)
    assert (round(small.total / 1e9, 3), round(large.total / 1e9, 3)) == (29.399, 423.526)
    assert round((small.total - small.vision_tower - small.resampler) / 1e9, 3) == 28.625
    assert small.float32 == 2 * 4_425_408
    assert small.active == published("ERNIE-4.5-21B-A3B-PT").active


@pytest.mark.parametrize("name", ["tiny-vl", "ERNIE-4.5-VL-28B-A3B-PT", "ERNIE-4.5-VL-424B-A47B-PT"])
def test_transformers_builds_vision_language_models_of_as_many_parameters(name: str) -> None:
    import torch
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    from ernie45.commands.transformers_config import transformers_config

    entry = find(name)
    assert entry is not None
    spec = entry.spec
    config = transformers_config(spec, tied=spec.tied is True, dtype="bfloat16", pad_token_id=0, media_ids={})
    with torch.device("meta"):
        model: Any = Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(**config))
    model.tie_weights()
    counts: dict[str, int] = {}
    for parameter_name, parameter in model.named_parameters():
        part = _part(parameter_name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    counted = entry.parameters
    assert counts == {
        "tower": counted.vision_tower,
        "resampler": counted.resampler,
        "vision_experts": counted.vision_experts,
        "vision_router": counted.vision_router,
        "text_experts": counted.routed_experts,
        "text_router": counted.router,
        "others": counted.total - sum(counts[part] for part in counts if part != "others"),
    }
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())


def _part(name: str) -> str:
    """Which part of the count a parameter of transformers' vision-language class belongs to."""
    for bank in ("vision", "text"):
        if f".{bank}_moe." in name:
            return f"{bank}_{'router' if '.gate.' in name else 'experts'}"
    return "tower" if ".vision_tower." in name else "resampler" if ".resampler_model." in name else "others"


# Real files


def test_the_built_in_dense_model_stores_what_is_counted() -> None:
    entry = find("ernie45/tiny-dense")
    assert entry is not None
    folder = built_in_folder(entry)
    spec = parse_spec(json.loads((folder / "config.json").read_text()))
    assert _stored(folder) == count_parameters(spec).total


@pytest.mark.parametrize(
    "name",
    ["dense", "dense-erniekit", "moe", "moe-sharded", "moe-300b-like", "moe-mtp", "moe-pf1.2-hf", "moe-pf1.2-native"],
)
def test_files_that_baidus_code_wrote_store_what_is_counted(shared_fixtures: Path, name: str) -> None:
    folder = shared_fixtures / "paddle" / name
    spec = parse_spec(json.loads((folder / "config.json").read_text()))
    counted = count_parameters(spec)
    assert _stored(folder) == counted.total + counted.mtp + _second_copy_of_a_tied_head(folder, spec)
    assert (counted.mtp > 0) == (name == "moe-mtp")


def test_a_vision_language_file_that_baidus_code_wrote_stores_what_is_counted(shared_fixtures: Path) -> None:
    folder = shared_fixtures / "paddle" / "vl"
    config = json.loads((folder / "config.json").read_text())
    spec = parse_spec(config)
    assert spec.vision is not None
    counted = count_parameters(spec)
    assert _stored(folder) == counted.total + _second_copy_of_a_tied_head(folder, spec)
    assert _stored(folder, "vision_model.") == counted.vision_tower == count_vision_tower(spec.vision)
    assert _stored(folder, "ernie.resampler_model.") == counted.resampler
    assert counted.resampler == count_resampler(spec.vision, hidden_size=64)
    router = _stored(folder, "", "mlp.gate.") + _stored(folder, "", "moe_statics")
    assert counted.float32 == counted.router + counted.vision_router == router


def _stored(folder: Path, start: str = "", part: str = "") -> int:
    tensors = read_headers(folder).tensors
    return sum(math.prod(info.shape) for name, info in tensors.items() if name.startswith(start) and part in name)


def _second_copy_of_a_tied_head(folder: Path, spec: ModelSpec) -> int:
    stored_twice = spec.tied and "lm_head.weight" in read_headers(folder).tensors
    return spec.vocab_size * spec.hidden_size if stored_twice else 0
