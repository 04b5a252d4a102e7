"""A report names what is wrong with a folder, and is there all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.commands import comparison
from ernie45.commands.convert import convert
from ernie45.commands.verify import verify
from ernie45.commands.verify_report import VerifyReport
from ernie45.errors import ModelNotFoundError
from ernie45.types.prompts import Prompt

MakeCheckpoint = Callable[..., Path]


@pytest.fixture
def source(small_folder_path: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(small_folder_path, tmp_path / "spoilt")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    stored = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


def fates(report: VerifyReport) -> dict[str, str]:
    return {group.pattern: group.fate for group in report.groups}


def test_a_good_folder(small_folder_path: Path) -> None:
    report = verify(small_folder_path, progress=False)
    assert report.is_good
    (comparison,) = report.comparisons
    assert comparison.is_close
    assert 0 <= comparison.max_difference < 1e-5
    assert (comparison.of, comparison.num_equal_ids, comparison.num_positions) == ("text", 16, 16)
    assert report.layout == "pt"
    assert report.dtypes == {"F32": (20, 4 * 37_024)}
    assert report.parameters == "37,024 by the headers; as many by config.json"
    assert report.files["model.safetensors"] == (small_folder_path / "model.safetensors").stat().st_size
    assert report.tokenizer == "321 tokens"
    assert sum(group.count for group in report.groups) == 20
    assert fates(report)["model.layers.*.self_attn.q_proj.weight"] == "read"
    text = str(report)
    assert text.startswith("## ernie45 verify: `small`\n\n**Good.**\n")
    assert "| `model.layers.*.self_attn.q_proj.weight` | 2 | F32 | [64, 32] | read |" in text
    assert "as close as promised" in text
    assert str(small_folder_path) not in text
    assert str(Path.home()) not in text
    assert set(report.versions) == {"ernie45", "torch", "transformers", "safetensors", "Python", "on"}


def test_every_missing_tensor_is_named(source: Path) -> None:
    missing = ("model__layers__0__self_attn__k_proj__weight", "model__layers__1__mlp__down_proj__weight")
    change(source, **dict.fromkeys(missing))
    report = verify(source, progress=False)
    assert not report.is_good
    assert len(report.problems) == 2
    for name, problem in zip(missing, report.problems, strict=True):
        assert f"spoilt has no tensor '{name.replace('__', '.')}'" in problem
    assert fates(report)["model.layers.*.self_attn.q_proj.weight"] == "read"  # its neighbour in one matrix
    assert report.comparisons == ()
    assert "because of the problems" in str(report)
    assert str(source.parent) not in str(report)


def test_an_unexpected_tensor_is_named(source: Path) -> None:
    change(source, model__layers__0__surprise=torch.ones(3))
    report = verify(source, progress=False)
    assert len(report.problems) == 1
    assert "model.layers.0.surprise" in report.problems[0]
    assert fates(report)["model.layers.*.surprise"] == "unexpected"


def test_a_wrong_shape_is_named(source: Path) -> None:
    change(source, model__norm__weight=torch.ones(31))
    report = verify(source, progress=False)
    assert "'model.norm.weight' is stored with shape [31]" in report.problems[0]
    assert "**2 problem(s):**" in str(report)  # the tensor also has no reason to be there


@pytest.mark.parametrize("name", ["moe-mtp", "moe-300b-like/bf16", "dense-pf1.2-native"])
def test_paddle_folders_are_compared_through_a_converted_one(shared_fixtures: Path, name: str) -> None:
    report = verify(shared_fixtures / "paddle" / name, progress=False)
    assert report.is_good, report.problems
    (comparison,) = report.comparisons
    assert "convert" in comparison.through
    assert report.layout == ("paddleformers" if "pf1.2" in name else "paddle")
    prefix = "model" if "pf1.2" in name else "ernie"
    found = fates(report)
    assert (
        found[f"{prefix}.layers.*.self_attn.qkv_proj.weight"] == "read, split into q_proj, k_proj, v_proj, transposed"
    )
    assert found[f"{prefix}.layers.*.self_attn.o_proj.weight"] == "read, transposed"
    assert all("not accounted" not in fate for fate in found.values())
    if name == "moe-mtp":
        assert "51,456 of the multi-token-prediction head; as many by config.json" in report.parameters
        assert found["ernie.mtp_linear_proj.*.weight"].startswith("ignored: multi-token-prediction")
        assert found["lm_head.weight"].startswith("ignored: equal to ernie.embed_tokens.weight")


def test_other_logits_than_transformers_are_a_problem(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = comparison._their_logits

    def shifted(folder: Path, prompts: list[Prompt]) -> list[torch.Tensor]:
        return [logits.roll(1, dims=-1) for logits in real(folder, prompts)]

    monkeypatch.setattr(comparison, "_their_logits", shifted)
    report = verify(source, progress=False)
    assert report.problems == ("the logits of text are not transformers'",)
    assert "FARTHER APART" in str(report)


def test_without_room_it_says_how_much_it_takes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "free_bytes", lambda device: 1_000_000)
    report = verify(source, progress=False)
    assert report.is_good
    assert report.comparisons == ()
    assert "about 500,185,120 bytes of memory, and 1,000,000 are free" in str(report)


def test_without_disk_a_paddle_folder_is_not_compared(shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    report = verify(shared_fixtures / "paddle" / "dense", progress=False)
    assert report.is_good
    assert "space for temporary files, and 1,000 are free" in report.comparison_note


def test_a_bias_that_transformers_would_ignore_is_no_problem(source: Path) -> None:
    change(source, lm_head__bias=torch.ones(384))
    report = verify(source, progress=False)
    assert report.is_good
    assert "lm_head.bias" in report.comparison_note


def test_headers_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail("ran a model")

    monkeypatch.setattr(comparison, "_our_logits", fail)
    report = verify(source, compare=False, progress=False)
    assert report.is_good
    assert report.comparison_note == "not asked for"


def test_a_config_that_cannot_be_read_leaves_the_headers(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    report = verify(source, progress=False)
    assert "llama" in report.problems[0]
    assert report.layout == ""
    assert set(fates(report).values()) == {"not accounted for"}
    assert "layout: unknown" in str(report)
    (source / "model.safetensors").write_bytes(b"short")
    damaged = verify(source, progress=False)
    assert "is no safetensors file" in damaged.problems[0]
    assert damaged.groups == ()
    assert "tensors: 0" in str(damaged)


def test_unknown_config_keys_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    report = verify(make_checkpoint(tmp_path / "odd", surprising_key=1), compare=False, progress=False)
    assert report.unknown_config_keys == ("surprising_key",)
    assert "surprising_key" in str(report)


def test_values_that_are_not_finite_are_found_by_running(source: Path) -> None:
    change(source, model__norm__weight=torch.full((32,), float("nan")))
    report = verify(source, progress=False)
    assert "not finite" in report.problems[0]
    assert report.comparison_note == "failed"


def test_a_converted_folder_is_good(shared_fixtures: Path, tmp_path: Path) -> None:
    convert(shared_fixtures / "paddle" / "moe-300b-like", tmp_path / "out", progress=False, max_shard_bytes=300_000)
    report = verify(tmp_path / "out", progress=False)
    assert report.is_good, report.problems
    assert [comparison.through for comparison in report.comparisons] == ["the folder itself"]


def test_a_model_is_shown_by_the_name_it_was_asked_for() -> None:
    report = verify("ernie45/tiny-dense", compare=False, progress=False)
    assert report.is_good
    assert report.folder == "ernie45/tiny-dense"


def test_a_home_that_is_the_root(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert "~" not in str(verify(source, compare=False, progress=False))


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-folder"):
        verify("./no-such-folder", progress=False)
