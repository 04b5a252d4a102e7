"""The head for multi-token prediction: which positions it sees, what it is compared with, what is saved of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

TOOLS_FOLDER = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The training script's modules, which import each other by plain names."""
    monkeypatch.syspath_prepend(str(TOOLS_FOLDER))
    import tiny_examples
    import tiny_family
    import tiny_mtp
    import tiny_training

    class Tools:
        examples, family, mtp, training = tiny_examples, tiny_family, tiny_mtp, tiny_training

    torch.manual_seed(1)
    return Tools


def make_pass(tools: Any, *, num_shared: int) -> Any:
    """Three rows of 12 to 14 random ids, of which the last 5 are the answer."""
    rows = [torch.randint(3, 2000, (length,)).tolist() for length in (12, 13, 14)]
    prefix = rows[0][:num_shared]
    examples = [
        tools.examples.Example(
            task_name="sort", ids=prefix + row[num_shared:], num_prompt=len(row) - 5, num_shared=num_shared
        )
        for row in rows
    ]
    (batch,) = tools.training.make_passes(examples)
    return batch


@pytest.mark.parametrize("num_shared", [0, 4])
def test_the_head_stands_one_token_before_the_trunk(tools: Any, num_shared: int) -> None:
    model = tools.family.MEMBERS["tiny-moe"].build().eval()
    batch = make_pass(tools, num_shared=num_shared)
    seen: list[torch.Tensor] = []

    def know_the_next_state(hidden: torch.Tensor, embedded: torch.Tensor, _rotary: object) -> torch.Tensor:
        seen.append(embedded)
        return hidden.roll(-1, dims=1)

    out = tools.mtp.head_logits(know_the_next_state, model, batch)
    assert len(out.targets) == 3 * 4  # all answer tokens but the first of each row
    assert torch.equal(out.logits.argmax(-1), out.trunk_tokens)
    assert out.targets.tolist() == [int(token) for row in range(3) for token in batch.targets[batch.rows == row][1:]]
    longest = [*batch.prefix, *batch.ids[0].tolist()]
    assert torch.equal(seen[0][0], model.model.embed_tokens(torch.tensor(longest[1:])))


def test_the_shared_prefix_makes_no_difference(tools: Any) -> None:
    model = tools.family.MEMBERS["tiny-moe"].build().eval()
    head = tools.mtp.MtpHead(model.config)
    batch = make_pass(tools, num_shared=4)
    whole = [[*batch.prefix, *row[: int(num)].tolist()] for row, num in zip(batch.ids, batch.num_tokens, strict=True)]
    (unshared,) = tools.training.make_passes(
        [tools.examples.Example(task_name="sort", ids=ids, num_prompt=len(ids) - 5) for ids in whole]
    )
    logits = [tools.mtp.head_logits(head, model, each).logits for each in (batch, unshared)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_saved_under_the_published_names(tools: Any, tmp_path: Path) -> None:
    model = tools.family.MEMBERS["tiny-moe"].build()
    save_file({"model.norm.weight": torch.ones(256)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 256}), encoding="utf-8")
    tools.mtp.add_to_folder(tools.mtp.MtpHead(model.config), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.pop("model.norm.weight").dtype == torch.float32
    block = [
        *(f"mlp.{name}_proj.weight" for name in ("down", "gate", "up")),
        *(f"self_attn.{name}_proj.weight" for name in "koqv"),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    others = ["mtp_emb_norm.0.weight", "mtp_hidden_norm.0.weight", "mtp_linear_proj.0.weight"]
    assert set(tensors) == {f"model.{name}" for name in [*(f"mtp_block.0.{name}" for name in block), *others]}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.mtp_linear_proj.0.weight"].shape == (256, 512)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {"hidden_size": 256, "num_nextn_predict_layers": 1}
