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
from ernie45.backends.vision_tower import Resampler
from ernie45.kernels.ops import route
from ernie45.types.media import Media, PlacedMedia
from ernie45.types.prompts import Prompt

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
OF_PICTURES = ("vl", "vl/bf16")
PLACEHOLDER_ID = 370


def test_every_fixture_is_here(shared_fixtures: Path) -> None:
    references = shared_fixtures.glob("paddle/**/reference.safetensors")
    folders = {file.parent.relative_to(shared_fixtures / "paddle").as_posix() for file in references}
    assert folders == {*LAYOUTS, *OF_PICTURES}


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The experts that routers chose since the start of the test, call by call."""
    chosen: list[torch.Tensor] = []

    def recording(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        numbers, shares = route(*arguments)
        chosen.append(numbers)
        return numbers, shares

    monkeypatch.setattr(decoder, "route", recording)
    return chosen


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_router_choices_and_greedy_ids(shared_fixtures: Path, routing: list[torch.Tensor], name: str) -> None:
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
            routing.clear()
            expected = reference["logits"][row, :num_tokens]
            torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=0)
            assert len(routing) == len(routers)
            for numbers, router in zip(routing, routers, strict=True):
                assert torch.equal(numbers, router[row, :num_tokens])
            greedy = model.generate(ids, temperature=0, max_new_tokens=12, ignore_eos=True).token_ids
            assert list(greedy) == reference["greedy_ids"][row].tolist()


@pytest.mark.parametrize("name", OF_PICTURES)
def test_vision_features_logits_router_choices_and_greedy_ids_of_pictures(
    shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch, routing: list[torch.Tensor], name: str
) -> None:
    features: list[tuple[torch.Tensor, torch.Tensor]] = []
    resample = Resampler.__call__

    def recording(resampler: Resampler, x: torch.Tensor, num_frames: int, window: int) -> torch.Tensor:
        features.append((x, resample(resampler, x, num_frames, window)))
        return features[-1][1]

    monkeypatch.setattr(Resampler, "__call__", recording)
    folder = shared_fixtures / "paddle" / name
    reference = load_file(folder / "reference.safetensors")
    routers = [reference[key] for key in sorted(reference) if key.endswith("topk_index")]
    types = reference["token_type_ids"]
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", context_tokens=64, progress=False) as model:
        assert model.load_report.layout == "paddle"
        assert model.load_report.unknown_config_keys == ()
        assert model.spec.vision is not None
        num_experts = model.spec.vision.experts.num_experts
        for row, prompt in enumerate(picture_prompts(reference)):
            routing.clear()
            logits = model.logits(prompt)
            torch.testing.assert_close(logits, reference["logits"][row], atol=1e-4, rtol=0)
            assert len(routing) == 2 * len(routers)
            for layer, router in enumerate(routers):
                text, pictures = routing[2 * layer : 2 * layer + 2]
                assert torch.equal(text, router[row][types[row, :-1] == 0])
                assert torch.equal(pictures + num_experts, router[row][types[row, :-1] == 1])
            greedy = model.generate(prompt, temperature=0, max_new_tokens=12, ignore_eos=True).token_ids
            assert list(greedy) == reference["greedy_ids"][row].tolist()
        ids = reference["text_only.input_ids"][0].tolist()
        torch.testing.assert_close(model.logits(ids), reference["text_only.logits"][0], atol=1e-4, rtol=0)
    assert len(features) == 2  # each picture was encoded once for both calls
    seen, embedded = (torch.cat(parts) for parts in zip(*features, strict=True))
    torch.testing.assert_close(seen, reference["vit_features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(embedded, reference["image_embeds"], atol=1e-4, rtol=0)


def picture_prompts(reference: dict[str, torch.Tensor]) -> list[Prompt]:
    """The fixture's rows, each with its picture as patches that are normalised already."""
    prompts, first_patch = [], 0
    for row, grid in zip(reference["input_ids"], reference["grid_thw"].tolist(), strict=True):
        frames, rows, columns = grid
        num_patches = frames * rows * columns
        patches = reference["pixel_values"][first_patch : first_patch + num_patches]
        first_patch += num_patches
        places = (row == PLACEHOLDER_ID).nonzero()[:, 0].tolist()
        assert places == list(range(places[0], places[0] + num_patches // 4))
        media = Media(
            kind="image",
            patches=patches,
            grid=(frames, rows, columns),
            num_tokens=len(places),
            digest=patches.numpy().tobytes(),
        )
        placed = (PlacedMedia(first=places[0], media=media),)
        prompts.append(Prompt(text="", token_ids=tuple(row.tolist()), media=placed))
    return prompts


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
