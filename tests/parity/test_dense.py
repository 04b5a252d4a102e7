"""Logits and greedy ids against transformers' own ERNIE 4.5, on random weights in many shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM, LogitsProcessor, LogitsProcessorList

from ernie45 import ErnieModel, SamplingOptions

VOCAB_SIZE = 160
NUM_TOKEN_IDS = 150  # as a tokenizer smaller than the embedding would have it

SHAPES: dict[str, dict[str, Any]] = {
    "as 0.3B, narrow": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
    "head_dim above hidden / heads": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 64},
    "head_dim below hidden / heads": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    "as many kv heads as heads": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16},
    "odd widths": {"hidden_size": 75, "intermediate_size": 131, "num_attention_heads": 6, "head_dim": 10},
    "untied": {"tie_word_embeddings": False},
    "biases": {"use_bias": True},
    "biases, untied": {"use_bias": True, "tie_word_embeddings": False, "num_attention_heads": 6},
    "one layer": {"num_hidden_layers": 1},
    "five layers, theta 10000": {
        "num_hidden_layers": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "large epsilon": {"rms_norm_eps": 1e-2},
}


def random_reference(seed: int, **shape: Any) -> Ernie4_5ForCausalLM:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    torch.manual_seed(seed)
    reference = Ernie4_5ForCausalLM(Ernie4_5Config(**{**settings, **shape})).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms start constant, which would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return reference


class BelowTokenizerSize(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, NUM_TOKEN_IDS:] = -torch.inf
        return scores


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ErnieModel]]:
    reference = random_reference(len(request.param), **SHAPES[request.param])
    folder: Path = tmp_path_factory.mktemp("dense")
    reference.save_pretrained(folder, max_shard_size="40KB" if "untied" in request.param else "5GB")
    with ErnieModel.from_pretrained(
        folder, dtype="float32", device="cpu", context_tokens=2048, progress=False
    ) as model:
        yield reference, model


def some_ids(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, NUM_TOKEN_IDS, (num_tokens,), generator=generator).tolist()


@pytest.mark.parametrize("num_tokens", [1, 7, 1100])
def test_logits(pair: tuple[Any, ErnieModel], num_tokens: int) -> None:
    reference, model = pair
    ids = some_ids(num_tokens, seed=num_tokens)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=0)


def test_greedy_ids_alone_and_in_a_ragged_batch(pair: tuple[Any, ErnieModel]) -> None:
    reference, model = pair
    prompts = [some_ids(n, seed=n) for n in (1, 2, 5, 17, 40)]
    forbid = dict.fromkeys(range(NUM_TOKEN_IDS, VOCAB_SIZE), -100.0)
    options: SamplingOptions = {"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True, "logit_bias": forbid}
    expected = [
        reference.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([BelowTokenizerSize()]),
        )[0, len(ids) :].tolist()
        for ids in prompts
    ]
    alone = [list(model.generate(ids, **options).token_ids) for ids in prompts]
    batch = [list(reply.token_ids) for reply in model.batch_generate(prompts, **options)]
    assert alone == expected
    assert batch == expected


def test_an_output_head_bias_is_added(tmp_path: Path) -> None:
    """Paddle's dense class has an `lm_head.bias`, transformers' has not: compare by hand."""
    from safetensors.torch import load_file, save_file

    reference = random_reference(3, use_bias=True)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bias = torch.linspace(-1, 1, VOCAB_SIZE)
    save_file({**tensors, "lm_head.bias": bias}, tmp_path / "model.safetensors")
    ids = some_ids(9, seed=1)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0] + bias
    with ErnieModel.from_pretrained(tmp_path, dtype="float32", progress=False) as model:
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=0)
