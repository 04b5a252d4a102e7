"""The published forms of a vision-language model, written from one set of weights, answer bit for bit alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45 import ErnieModel
from tests.vl_files import write_hub, write_paddle
from tests.vl_models import (
    IDS,
    add_text_side,
    clip,
    picture,
    prompt_of,
    random_reference,
    reference_logits,
    save_reference,
    text_ids,
)

SHAPES: dict[str, dict[str, Any]] = {
    "as 28B, narrow": {},
    "as 424B, narrow": {
        "text": {
            "moe_num_shared_experts": 0,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "num_hidden_layers": 4,
            "moe_intermediate_size": [12, 28],
            "tie_word_embeddings": False,
        },
        "tie_word_embeddings": False,
    },
    "64 experts of each kind": {
        "text": {"moe_num_experts": 64, "moe_k": 6, "num_hidden_layers": 2, "moe_intermediate_size": [6, 4]}
    },
    "biases, as many kv heads": {"text": {"use_bias": True, "num_key_value_heads": 4}},
    "square everything": {
        "text": {
            "hidden_size": 64,
            "num_key_value_heads": 4,
            "intermediate_size": 64,
            "moe_intermediate_size": [32, 64],
        }
    },
}
FORMS: dict[str, tuple[str, Callable[[Path, Any], Path]]] = {
    "hub": ("pt", write_hub),
    "hub, in shards": ("pt", lambda folder, reference: write_hub(folder, reference, num_shards=3)),
    "Paddle": ("paddle", write_paddle),
    "Paddle, bf16 in shards, a bare resampler": (
        "paddle",
        lambda folder, reference: write_paddle(folder, reference, names="bare resampler", dtype="U16", num_shards=2),
    ),
    "Paddle, a tower with the prefix": (
        "paddle",
        lambda folder, reference: write_paddle(folder, reference, names="ernie. before the tower too", dtype="BF16"),
    ),
}
PROMPTS = [
    prompt_of(text_ids(4), picture(4, 6, seed=1), text_ids(3), clip(4, 2, 4, seed=2), [101]),
    prompt_of(text_ids(12, seed=1)),
]


def bf16_reference(**shape: Any) -> Any:
    """Weights that bf16 holds exactly; the routers, which no form stores in bf16, do not."""
    reference = random_reference(**shape)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if ".gate." not in name:
                parameter.copy_(parameter.bfloat16())
    return reference


def logits_of(folder: Path, layout: str) -> list[Tensor]:
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
        assert model.load_report.layout == layout
        assert model.load_report.unknown_config_keys == ()
        assert model.load_report.ignored == () or [t.name for t in model.load_report.ignored] == ["lm_head.weight"]
        return [model.logits(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_gives_the_same_bits(tmp_path: Path, tokenizer_folder: Path, shape: str) -> None:
    reference = bf16_reference(**SHAPES[shape])
    native = logits_of(save_reference(reference, tmp_path / "native", tokenizer_folder), "pt")
    for prompt, logits in zip(PROMPTS, native, strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, prompt), atol=1e-4, rtol=0)
        assert logits.std() > 0.1
    for form, (layout, write) in FORMS.items():
        found = logits_of(write(tmp_path / form, reference), layout)
        assert all(torch.equal(a, b) for a, b in zip(found, native, strict=True)), form


def test_media_tokens_go_by_their_names_and_not_by_their_numbers(tmp_path: Path, tokenizer_folder: Path) -> None:
    from PIL import Image

    # As PaddleOCR-VL has them, in small: the markers at once after the text's tokens, then the placeholder.
    others = dict(zip(IDS, (348, 342, 343, 345, 346, 341), strict=True))
    turns = {"<|begin_of_sentence|>": 344, "<|end_of_sentence|>": 347}
    messages = [{"role": "user", "content": ["cat", Image.linear_gradient("L").resize((70, 90)), "hat"]}]
    reference = random_reference()
    order = torch.arange(384)
    for name, number in IDS.items():
        order[[number, others[name]]] = torch.tensor([others[name], number])
    answers = []
    for ids in (IDS, others):
        folder = write_hub(tmp_path / str(ids["<|IMAGE_START|>"]), reference)
        add_text_side(folder, tokenizer_folder, {**ids, **turns})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "im_patch_id": 1}))
        with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
            prompt = model.render(messages)
            answers.append((prompt, model.logits(prompt)))
        with torch.no_grad():
            embedding = reference.get_input_embeddings().weight
            embedding.copy_(embedding[order].clone())
    (first, expected), (second, logits) = answers
    assert len(first.media) == 1
    assert list(second.token_ids) == [int(order[number]) for number in first.token_ids]
    assert second.token_ids != first.token_ids
    assert torch.equal(logits[:, order], expected)
