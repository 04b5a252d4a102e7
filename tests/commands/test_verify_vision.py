"""Reports on vision-language folders compare a text and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.commands import comparison
from ernie45.commands.compared_prompts import picture_prompt, transformers_inputs
from ernie45.commands.verify import verify
from ernie45.commands.verify_report import VerifyReport
from ernie45.spec import parse_spec
from ernie45.types.prompts import Prompt
from tests.commands.published_vl import as_published
from tests.vl_models import IDS, random_reference, reference_logits, save_reference


@pytest.fixture(scope="module")
def reference() -> Any:
    return random_reference()


@pytest.fixture(scope="module")
def native(reference: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(reference, tmp_path_factory.mktemp("vl") / "native", tokenizer_folder)


def fates(report: VerifyReport) -> dict[str, str]:
    return {group.pattern: group.fate for group in report.groups}


def test_transformers_own_form(native: Path) -> None:
    report = verify(native, progress=False)
    assert report.is_good, report.problems
    assert [(each.of, each.num_positions, each.num_equal_ids) for each in report.comparisons] == [
        ("text", 16, 16),
        ("a picture", 22, 22),
    ]
    assert all(each.through == "the folder itself" for each in report.comparisons)
    assert report.parameters.endswith("as many by config.json")
    assert fates(report)["model.layers.*.mlp.gate.weight_*"] == "read, transposed"
    assert all("not accounted" not in fate for fate in fates(report).values())
    text = str(report)
    assert "- logits of text beside transformers: as close as promised" in text
    assert "- logits of a picture beside transformers: as close as promised" in text
    assert "pictures have 8 experts of their own and a tower of 2 layers" in text


def test_the_published_form(native: Path, tmp_path: Path) -> None:
    report = verify(as_published(native, tmp_path / "published"), progress=False)
    assert report.is_good, report.problems
    assert [each.through for each in report.comparisons] == [
        "the folder itself, its config as `ernie45 convert` writes it"
    ] * 2
    assert fates(report)["vision_model.patch_embed.proj.weight"] == "read"


@pytest.mark.parametrize("kind", ["", "bf16"])
def test_paddle_s_form(shared_fixtures: Path, kind: str) -> None:
    report = verify(shared_fixtures / "paddle" / "vl" / kind, progress=False)
    assert report.is_good, report.problems
    assert [each.of for each in report.comparisons] == ["text", "a picture"]
    assert report.layout == "paddle"
    assert report.parameters == "349,040 by the headers; as many by config.json"
    found = fates(report)
    assert found["vision_model.patch_embed.proj.weight"] == "read, transposed"
    assert found["ernie.resampler_model.mlp.weight"] == "read, transposed"
    assert found["lm_head.weight"].startswith("ignored: equal to")


def test_a_missing_vision_tensor_is_named(native: Path, tmp_path: Path) -> None:
    folder = as_published(native, tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    del tensors["vision_model.blocks.1.attn.qkv.bias"]
    save_file(tensors, folder / "model.safetensors")
    report = verify(folder, progress=False)
    assert "has no tensor 'vision_model.blocks.1.attn.qkv.bias'" in report.problems[0]
    assert report.comparisons == ()


def test_a_difference_in_the_vision_tower_shows_in_the_picture_alone(
    native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparison._their_logits

    def brightened(folder: Path, prompts: Sequence[Prompt], config: Any = None) -> list[torch.Tensor]:
        changed = [prompt for prompt in prompts if prompt.media]
        patches = changed[0].media[0].media.patches
        patches //= 2
        return real(folder, prompts, config)

    monkeypatch.setattr(comparison, "_their_logits", brightened)
    report = verify(native, progress=False)
    assert report.problems == ("the logits of a picture are not transformers'",)


def test_the_prompt_with_a_picture_is_what_transformers_makes_of_one(reference: Any) -> None:
    spec = parse_spec({**reference.config.to_dict(), "dtype": "float32"})
    assert spec.vision is not None
    ids = {"image_token_id": IDS["<|IMAGE_PLACEHOLDER|>"], "image_start_token_id": 11}
    prompt = picture_prompt(spec.vision, 360, ids)
    assert prompt.token_ids.count(ids["image_token_id"]) == 6
    assert prompt.token_ids[prompt.media[0].first - 1] == 11
    with torch.inference_mode():
        logits = reference(**transformers_inputs(prompt)).logits[0]
    torch.testing.assert_close(logits, reference_logits(reference, prompt))
