"""A folder as Baidu publishes the 0.3B (files, names, widths, vocabulary), with random weights in two layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45 import ErnieModel

NUM_LAYERS = 2
NUM_TOKEN_IDS = 101304  # the tokenizer's; the embedding has 103424 rows
MESSAGES = [{"role": "user", "content": "人工智能的发展前景 in 12 words?"}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("published") / "ERNIE-4.5-0.3B-PT"
    folder.mkdir()
    for file in (shared_data / "ERNIE-4.5-0.3B-PT").iterdir():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = NUM_LAYERS
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    yield folder
    shutil.rmtree(folder)


def random_weights() -> dict[str, torch.Tensor]:
    """Shapes and names of the published file, written out: nothing here comes from the code under test."""
    generator = torch.Generator().manual_seed(45)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        return values.normal_(0, columns**-0.5, generator=generator)

    def norm() -> torch.Tensor:
        return torch.empty(1024, dtype=torch.bfloat16).normal_(1, 0.1, generator=generator)

    embedding = matrix(103424, 1024)
    embedding[NUM_TOKEN_IDS:] *= 10  # so that rows without a token would often win
    tensors = {"model.embed_tokens.weight": embedding}
    for index in range(NUM_LAYERS):
        prefix = f"model.layers.{index}."
        tensors |= {
            f"{prefix}input_layernorm.weight": norm(),
            f"{prefix}self_attn.q_proj.weight": matrix(2048, 1024),
            f"{prefix}self_attn.k_proj.weight": matrix(256, 1024),
            f"{prefix}self_attn.v_proj.weight": matrix(256, 1024),
            f"{prefix}self_attn.o_proj.weight": matrix(1024, 2048),
            f"{prefix}post_attention_layernorm.weight": norm(),
            f"{prefix}mlp.gate_proj.weight": matrix(3072, 1024),
            f"{prefix}mlp.up_proj.weight": matrix(3072, 1024),
            f"{prefix}mlp.down_proj.weight": matrix(1024, 3072),
        }
    return {**tensors, "model.norm.weight": norm()}


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[ErnieModel]:
    with ErnieModel.from_pretrained(
        folder, device="cpu", dtype="float32", context_tokens=256, max_batch=2, progress=False
    ) as model:
        yield model


@pytest.mark.usefixtures("no_network")
def test_everything_is_read(folder: Path, model: ErnieModel) -> None:
    assert not (folder / "tokenizer.json").exists()
    assert model.tokenizer.size == NUM_TOKEN_IDS
    report = model.load_report
    assert (report.num_tensors, report.ignored, report.unknown_config_keys) == (2 + 9 * NUM_LAYERS, (), ())
    assert report.weight_bytes == 4 * (103424 * 1024 + 1024 + NUM_LAYERS * (14_155_776 + 2048))


def test_chat_is_rendered_by_the_published_template(shared_data: Path, model: ErnieModel) -> None:
    golden = json.loads((shared_data / "golden" / "tokenization.json").read_text())["chat"]
    assert list(model.render(golden["messages"]).token_ids) == golden["ids"]


def test_logits_and_greedy_ids_are_those_of_transformers(folder: Path, model: ErnieModel) -> None:
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    prompt = model.render(MESSAGES)
    ids = torch.tensor([prompt.token_ids])
    positions = [0, 3, len(prompt) // 2, len(prompt) - 1]
    with torch.inference_mode():
        expected = reference(ids).logits[0]
        torch.testing.assert_close(model.logits(prompt, positions=positions), expected[positions], atol=1e-4, rtol=1e-5)
        reference_ids = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            min_new_tokens=32,
            suppress_tokens=[*range(NUM_TOKEN_IDS, 103424), 2],
            use_cache=True,
        )[0, ids.shape[1] :].tolist()
    forbid_end = {2: -100.0}
    completion = model.generate(prompt, temperature=0, max_new_tokens=32, logit_bias=forbid_end, ignore_eos=True)
    assert list(completion.token_ids) == reference_ids
    assert completion.text == model.tokenizer.decode(reference_ids)


def test_ids_without_a_token_are_never_drawn(model: ErnieModel) -> None:
    tail = model.logits("你好", positions=[-1])[0].div(5).softmax(-1)[NUM_TOKEN_IDS:].sum()
    assert tail > 0.1  # 40 draws would hit some
    options: dict[str, Any] = {"temperature": 5.0, "top_p": 1.0, "max_new_tokens": 20, "ignore_eos": True}
    replies = model.batch_generate([{"prompt": "你好", "seed": seed} for seed in range(2)], **options)
    assert max(max(reply.token_ids) for reply in replies) < NUM_TOKEN_IDS
