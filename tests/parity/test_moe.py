"""Logits and greedy ids against transformers' own ERNIE 4.5 mixture of experts, on random weights in many shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from ernie45 import ErnieModel, SamplingOptions
from ernie45.errors import TensorError

VOCAB_SIZE = 120
NUM_NEW_TOKENS = 16

SHAPES: dict[str, dict[str, Any]] = {
    "as 21B, narrow": {"moe_num_experts": 16, "moe_k": 6, "num_attention_heads": 5, "num_key_value_heads": 1},
    "as 300B, narrow": {
        "num_hidden_layers": 5,
        "moe_layer_start_index": 3,
        "moe_num_shared_experts": 0,
        "moe_k": 8,
        "moe_num_experts": 16,
        "num_attention_heads": 8,
        "head_dim": 16,
        "tie_word_embeddings": False,
    },
    "experts from the first layer": {"moe_layer_start_index": 0},
    "two dense layers, one expert a token": {"moe_layer_start_index": 2, "moe_k": 1, "num_hidden_layers": 4},
    "every second layer": {"moe_layer_interval": 2, "num_hidden_layers": 5, "moe_layer_start_index": 0},
    "every second layer, from the third": {
        "moe_layer_interval": 2,
        "num_hidden_layers": 6,
        "moe_layer_start_index": 2,
        "moe_num_shared_experts": 0,
    },
    "experts end before the last layer": {"num_hidden_layers": 4, "moe_layer_end_index": 2},
    "every expert for every token": {"moe_num_experts": 4, "moe_k": 4},
    "three shared experts, untied": {"moe_num_shared_experts": 3, "tie_word_embeddings": False},
    "no shared experts": {"moe_num_shared_experts": 0, "num_key_value_heads": 4},
    "head_dim above hidden / heads": {"head_dim": 32},
    "biases": {"use_bias": True},
    "biases, untied, none shared": {"use_bias": True, "tie_word_embeddings": False, "moe_num_shared_experts": 0},
    "odd widths, large epsilon": {"hidden_size": 45, "head_dim": 10, "moe_intermediate_size": 13, "rms_norm_eps": 1e-2},
    "a least sum that counts": {"moe_norm_min": 0.6, "moe_num_experts": 12},
}
SHARDED = ("as 300B, narrow", "biases", "experts end before the last layer")


def random_reference(seed: int, **shape: Any) -> Ernie4_5_MoeForCausalLM:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 20,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "experts_implementation": "eager",  # the faster one wants widths that are multiples of 4
    }
    torch.manual_seed(seed)
    reference = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**settings, **shape})).eval()
    with torch.no_grad():
        # Biases, norms, the router and its correction start constant, which would hide a mistake.
        for name, parameter in reference.named_parameters():
            spread = 1.0 if name.endswith("mlp.gate.weight") else 0.3 if "e_score" in name else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    return reference


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ErnieModel]]:
    reference = random_reference(len(request.param), **SHAPES[request.param])
    folder: Path = tmp_path_factory.mktemp("moe")
    reference.save_pretrained(folder, max_shard_size="60KB" if request.param in SHARDED else "5GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or request.param not in SHARDED
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
        yield reference, model


def some_ids(num_tokens: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(reference: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([ids])).logits[0]
    return logits


def test_logits(pair: tuple[Any, ErnieModel]) -> None:
    reference, model = pair
    for num_tokens in (1, 7, 130):
        ids = some_ids(num_tokens, seed=num_tokens)
        torch.testing.assert_close(model.logits(ids), logits_of(reference, ids), atol=1e-4, rtol=0)


def test_greedy_ids_alone_and_in_a_ragged_batch(pair: tuple[Any, ErnieModel]) -> None:
    reference, model = pair
    prompts = [some_ids(n, seed=n) for n in (1, 5, 18)]
    options: SamplingOptions = {"temperature": 0.0, "max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True}
    alone = [list(model.generate(ids, **options).token_ids) for ids in prompts]
    assert [list(reply.token_ids) for reply in model.batch_generate(prompts, **options)] == alone
    for ids, reply in zip(prompts, alone, strict=True):
        # One pass over prompt and reply: each token of the reply must be the reference's first choice at its place.
        assert logits_of(reference, ids + reply[:-1])[len(ids) - 1 :].argmax(-1).tolist() == reply
        assert len(reply) == NUM_NEW_TOKENS


def test_without_the_correction_other_experts_answer(tmp_path: Path) -> None:
    reference = random_reference(1)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    ids = some_ids(20, seed=2)
    expected = logits_of(reference, ids)
    corrections = [name for name in stored if name.endswith("e_score_correction_bias")]
    assert len(corrections) == 2

    zeroed = {**stored, **{name: torch.zeros_like(stored[name]) for name in corrections}}
    without = {name: values for name, values in stored.items() if name not in corrections}
    config = json.loads((tmp_path / "config.json").read_text())
    answers = []
    for tensors, says in ((zeroed, {}), (without, {"moe_use_aux_free": False})):
        save_file(tensors, file)
        (tmp_path / "config.json").write_text(json.dumps({**config, **says}))
        with ErnieModel.from_pretrained(tmp_path, dtype="float32", device="cpu", progress=False) as model:
            answers.append(model.logits(ids))
    assert torch.equal(answers[0], answers[1])
    assert (answers[0] - expected).abs().max() > 0.1


def test_corrections_that_a_conversion_lost_are_missed(tmp_path: Path) -> None:
    random_reference(1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: values for name, values in load_file(file).items() if "e_score" not in name}, file)
    with pytest.raises(TensorError, match="e_score_correction_bias"):
        ErnieModel.from_pretrained(tmp_path, progress=False)
