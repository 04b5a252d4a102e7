"""The same model on a CUDA GPU and on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

from ernie45 import ErnieModel, SamplingOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Ernie4_5Config(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, head_dim=64
    )
    folder = tmp_path_factory.mktemp("dense")
    Ernie4_5ForCausalLM(config).save_pretrained(folder)
    return folder


def test_logits_and_greedy_ids_equal_the_cpus(folder: Path) -> None:
    prompts = [[5, 6, 7], list(range(10, 90)), [499]]
    options: SamplingOptions = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    with (
        ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", context_tokens=256) as cpu,
        ErnieModel.from_pretrained(folder, dtype="float32", device="cuda", context_tokens=256) as cuda,
    ):
        torch.testing.assert_close(cuda.logits(prompts[1]), cpu.logits(prompts[1]), atol=1e-4, rtol=0)
        expected = [reply.token_ids for reply in cpu.batch_generate(prompts, **options)]
        assert [reply.token_ids for reply in cuda.batch_generate(prompts, **options)] == expected
        assert [cuda.generate(prompt, **options).token_ids for prompt in prompts] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_generates(folder: Path, dtype: str) -> None:
    with ErnieModel.from_pretrained(folder, dtype=dtype, device="cuda", context_tokens=256) as model:
        assert len(model.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids) == 8


def test_close_gives_the_gpus_memory_back(folder: Path) -> None:
    before = torch.cuda.memory_allocated()
    model = ErnieModel.from_pretrained(folder, device="cuda", context_tokens=256)
    assert torch.cuda.memory_allocated() > before
    model.close()
    assert torch.cuda.memory_allocated() == before
