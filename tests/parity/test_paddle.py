"""Logits, router choices and greedy ids against Baidu's own Paddle code, run on small checkpoints in its layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ernie45 import ErnieModel
from ernie45.backends import decoder
from ernie45.kernels.ops import route

LAYOUTS = {
    "dense": "paddle",
    "dense/bf16": "paddle",
    "dense-erniekit": "paddle",
    "dense-erniekit/bf16": "paddle",
    "dense-pf1.2-native": "paddleformers",
    "moe": "paddle",
    "moe/bf16": "paddle",
    "moe-300b-like": "paddle",
    "moe-300b-like/bf16": "paddle",
    "moe-mtp": "paddle",
    "moe-mtp/bf16": "paddle",
    "moe-pf1.2-hf": "pt",
    "moe-pf1.2-native": "paddleformers",
    "moe-sharded": "paddle",
    "moe-sharded/bf16": "paddle",
}


def test_every_text_fixture_is_here(shared_fixtures: Path) -> None:
    references = shared_fixtures.glob("paddle/**/reference.safetensors")
    folders = {file.parent.relative_to(shared_fixtures / "paddle").as_posix() for file in references}
    assert {name for name in folders if name.split("/")[0] != "vl"} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_router_choices_and_greedy_ids(
    shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chosen: list[torch.Tensor] = []

    def recording(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, shares = route(*arguments)
        chosen.append(numbers)
        return numbers, shares

    monkeypatch.setattr(decoder, "route", recording)
    folder = shared_fixtures / "paddle" / name
    reference = load_file(folder / "reference.safetensors")
    routers = [reference[key] for key in sorted(reference) if key.endswith("topk_index")]
    assert bool(routers) == name.startswith("moe")
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", context_tokens=64, progress=False) as model:
        assert model.load_report.layout == LAYOUTS[name]
        assert model.load_report.unknown_config_keys == ()
        for row in range(2):
            num_tokens = int(reference["attention_mask"][row].sum())
            ids = reference["input_ids"][row, :num_tokens].tolist()
            chosen.clear()
            expected = reference["logits"][row, :num_tokens]
            torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=0)
            assert len(chosen) == len(routers)
            for numbers, router in zip(chosen, routers, strict=True):
                assert torch.equal(numbers, router[row, :num_tokens])
            greedy = model.generate(ids, temperature=0, max_new_tokens=12, ignore_eos=True).token_ids
            assert list(greedy) == reference["greedy_ids"][row].tolist()


@pytest.mark.parametrize(("name", "dtype"), [("moe", "float32"), ("moe/bf16", "bfloat16"), ("dense/bf16", "bfloat16")])
def test_where_the_config_is_silent_the_stored_dtype_is_taken(
    shared_fixtures: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    folder = shared_fixtures / "paddle" / name
    config = json.loads((folder / "config.json").read_text())
    silent = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with ErnieModel.from_pretrained(tmp_path, device="cpu", context_tokens=16, progress=False) as model:
        assert model.load_report.dtype == dtype


def test_the_multi_token_prediction_head_is_left_out_and_named(shared_fixtures: Path) -> None:
    folder = shared_fixtures / "paddle" / "moe-mtp"
    with ErnieModel.from_pretrained(folder, device="cpu", context_tokens=16, progress=False) as model:
        ignored = model.load_report.ignored
    heads = [tensor for tensor in ignored if tensor.name.startswith("ernie.mtp_")]
    assert len(heads) == 9
    assert all("multi-token-prediction" in tensor.reason for tensor in heads)
    assert [tensor.name for tensor in ignored if tensor not in heads] == ["lm_head.weight"]  # a copy of the embedding
