from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernie45.catalogue import (
    CATALOGUE,
    ModelInfo,
    built_in_folder,
    did_you_mean,
    find,
    list_models,
    suggest,
)
from ernie45.checkpoint.headers import read_headers
from ernie45.families import FAMILIES
from ernie45.spec import parse_generation_defaults, parse_spec

DOCS = Path(__file__).resolve().parents[1] / "docs"

# Baidu's ten variants, each for torch and for Paddle; two reasoning models; five quantised Paddle releases.
VARIANTS = [
    f"ERNIE-4.5-{size}{base}"
    for size in ("0.3B", "21B-A3B", "300B-A47B", "VL-28B-A3B", "VL-424B-A47B")
    for base in ("", "-Base")
]
THINKING = ["ERNIE-4.5-21B-A3B-Thinking", "ERNIE-4.5-VL-28B-A3B-Thinking"]
QUANTISED = {
    "ERNIE-4.5-300B-A47B-FP8-Paddle": "fp8",
    "ERNIE-4.5-300B-A47B-W4A8C8-TP4-Paddle": "W4A8",
    "ERNIE-4.5-300B-A47B-2Bits-Paddle": "2-bit",
    "ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle": "2-bit",
    "ERNIE-4.5-300B-A47B-2Bits-TP4-Paddle": "2-bit",
}
BUILT_IN = ["ernie45/tiny-dense", "ernie45/tiny-moe", "ernie45/tiny-vl"]


def entry(name: str) -> ModelInfo:
    found = find(name)
    assert found is not None
    return found


# What is in it


def test_every_published_checkpoint_is_listed_once() -> None:
    published = [f"{name}{suffix}" for name in VARIANTS for suffix in ("-PT", "-Paddle")] + THINKING + [*QUANTISED]
    assert len(published) == 27
    listed = [info.name for info in list_models()]
    assert sorted(listed) == sorted([*BUILT_IN, *(f"baidu/{name}" for name in published)])
    assert len({info.short_name.lower() for info in CATALOGUE}) == len(listed)


def test_a_list_of_its_own_for_every_caller() -> None:
    list_models().clear()
    assert len(list_models()) == len(CATALOGUE)


@pytest.mark.parametrize("info", CATALOGUE, ids=lambda info: info.short_name)
def test_an_entry_says_what_its_name_says(info: ModelInfo) -> None:
    name = info.short_name
    assert info.built_in == (info.name in BUILT_IN)
    assert info.format == ("paddle" if name.endswith("-Paddle") else "torch")
    assert info.precision == QUANTISED.get(name, "bf16")
    assert (info.modality == "vision-language") == (info.spec.vision is not None) == ("-vl" in name.lower())
    assert info.family in name
    if not info.built_in:
        kind = "base" if "-Base-" in name else "thinking" if name in THINKING else "instruct"
        assert info.kind == kind
        assert info.context_tokens == 131_072


@pytest.mark.parametrize("info", CATALOGUE, ids=lambda info: info.short_name)
def test_sizes_follow_from_the_parameters(info: ModelInfo) -> None:
    counted = info.parameters
    assert (info.total_params, info.active_params) == (counted.total, counted.active)
    assert info.weight_bytes == 2 * (counted.total - counted.float32) + 4 * counted.float32
    if info.short_name in QUANTISED:
        assert info.disk_bytes_approximate
        assert 0.1 < info.disk_bytes / info.weight_bytes < 0.6
    else:
        assert info.disk_bytes == info.weight_bytes + 2 * counted.mtp


def test_sizes_in_numbers() -> None:
    gigabytes = {info.short_name: round(info.weight_bytes / 1e9, 1) for info in CATALOGUE}
    assert gigabytes["ERNIE-4.5-0.3B-PT"] == 0.7
    assert gigabytes["ERNIE-4.5-300B-A47B-PT"] == gigabytes["ERNIE-4.5-300B-A47B-2Bits-Paddle"] == 599.0
    assert gigabytes["ERNIE-4.5-VL-28B-A3B-PT"] == 58.8
    assert gigabytes["ERNIE-4.5-VL-424B-A47B-PT"] == 847.2
    thinking = entry("ERNIE-4.5-21B-A3B-Thinking")
    assert thinking.weight_bytes == thinking.disk_bytes == 2 * 21_821_012_480 + 4 * 4_425_408  # the Hub's counts
    assert not thinking.disk_bytes_approximate


def test_unknown_generation_defaults_are_not_guessed() -> None:
    known = {info.short_name for info in CATALOGUE if info.generation_defaults is not None}
    assert "ERNIE-4.5-0.3B-Base-PT" in known
    assert not known & {*THINKING, "ERNIE-4.5-VL-28B-A3B-PT"}
    for info in CATALOGUE:
        defaults = info.generation_defaults
        assert defaults is None or (defaults.temperature, defaults.top_p) == (0.8, 0.8)


# Hyper-parameters


@pytest.mark.parametrize("info", CATALOGUE, ids=lambda info: info.short_name)
def test_the_config_is_read_like_a_published_one(info: ModelInfo) -> None:
    assert json.loads(json.dumps(info.config)) == info.config
    assert info.spec == parse_spec(info.config)
    assert info.spec.unknown_keys == ()
    assert all(parameter.source for parameter in info.hyper_parameters)


def test_what_is_worked_out_is_marked() -> None:
    def derived(name: str) -> set[str]:
        return {parameter.name for parameter in entry(name).hyper_parameters if parameter.status == "derived"}

    assert derived("ERNIE-4.5-0.3B-PT") == derived("ERNIE-4.5-21B-A3B-PT") == set()
    assert derived("ERNIE-4.5-21B-A3B-Thinking") == {"num_nextn_predict_layers"}
    assert "tie_word_embeddings" in derived("ERNIE-4.5-300B-A47B-PT")
    assert {"moe_intermediate_size", "tie_word_embeddings"} <= derived("ERNIE-4.5-VL-424B-A47B-PT")


def test_a_caller_cannot_change_the_catalogue() -> None:
    info = entry("ERNIE-4.5-VL-28B-A3B-PT")
    info.config["moe_num_experts"].append(1)
    info.config["vision_config"].clear()
    assert info.config["moe_num_experts"] == [64, 64]
    assert info.config["vision_config"]["depth"] == 32


def test_the_shape_of_03b_is_the_published_one(shared_data: Path) -> None:
    published = json.loads((shared_data / "ERNIE-4.5-0.3B-PT" / "config.json").read_text())
    config = entry("ERNIE-4.5-0.3B-PT").config
    assert {key: published[key] for key in config} == config
    assert entry("ERNIE-4.5-0.3B-PT").spec == parse_spec(published)


def test_a_vision_language_model_has_a_trunk_and_what_pictures_need() -> None:
    spec = entry("ERNIE-4.5-VL-28B-A3B-PT").spec
    assert spec.experts == entry("ERNIE-4.5-21B-A3B-PT").spec.experts
    assert spec.vision is not None
    assert (spec.vision.num_layers, spec.vision.hidden_size, spec.vision.intermediate_size) == (32, 1280, 5120)
    assert (spec.vision.experts.num_experts, spec.vision.experts.intermediate_size) == (64, 512)


def test_an_entry_is_a_plain_value() -> None:
    info = entry("ERNIE-4.5-VL-424B-A47B-PT")
    assert len({info, dataclasses.replace(info)}) == 1
    assert dataclasses.asdict(info)["parameters"]["head"] == info.parameters.head
    assert "424B" in repr(info)
    assert "vision_config" not in repr(info)


# The files of the built-in models


@pytest.fixture(params=BUILT_IN)
def built_in(request: pytest.FixtureRequest) -> ModelInfo:
    return entry(request.param)


def test_built_in_checkpoints_lie_inside_the_package() -> None:
    folder = built_in_folder(entry("tiny-dense"))
    assert folder.is_absolute()
    assert folder.parts[-4:] == ("ernie45", "assets", "tiny", "tiny-dense")


def test_built_in_files_have_the_listed_shape(built_in: ModelInfo) -> None:
    written = parse_spec(json.loads((built_in_folder(built_in) / "config.json").read_text()))
    assert _without_what_files_need_not_say(written) == _without_what_files_need_not_say(built_in.spec)


def test_built_in_files_have_the_listed_sizes(built_in: ModelInfo) -> None:
    tensors = read_headers(built_in_folder(built_in)).tensors
    assert sum(info.num_bytes for info in tensors.values()) == built_in.disk_bytes
    mtp_bytes = sum(info.num_bytes for name, info in tensors.items() if "mtp_" in name)
    assert built_in.disk_bytes - mtp_bytes == built_in.weight_bytes


def test_built_in_files_have_the_listed_defaults(built_in: ModelInfo) -> None:
    written = json.loads((built_in_folder(built_in) / "generation_config.json").read_text())
    assert dataclasses.replace(parse_generation_defaults(written), eos_token_ids=()) == built_in.generation_defaults


def _without_what_files_need_not_say(spec: Any) -> Any:
    experts = spec.experts and dataclasses.replace(spec.experts, has_correction_bias=True)
    return dataclasses.replace(spec, experts=experts, num_mtp_layers=0, eos_token_ids=(), unknown_keys=())


# Names


@pytest.mark.parametrize(
    "spelling",
    ["baidu/ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B-PT", "ernie-4.5-0.3b-pt", " Baidu/ernie-4.5-0.3B-pt "],
)
def test_finds_a_name_with_or_without_organisation_in_any_case(spelling: str) -> None:
    assert entry(spelling).name == "baidu/ERNIE-4.5-0.3B-PT"


@pytest.mark.parametrize(
    "name",
    [
        "", "baidu", "/ERNIE-4.5-0.3B-PT", "other/ERNIE-4.5-0.3B-PT", "ernie45/ERNIE-4.5-0.3B-PT", "ERNIE-4.5-0.3B",
        "PaddlePaddle/ERNIE-4.5-0.3B-PT", "a/baidu/ERNIE-4.5-0.3B-PT",
    ],
)  # fmt: skip
def test_unknown_names_are_not_found(name: str) -> None:
    assert find(name) is None


@pytest.mark.parametrize(
    ("near_miss", "meant"),
    [
        ("ERNIE-4.5-21B-A3B", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("baidu/ERNIE-4.5-21B-PT", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("ernie-4.5-vl-424b-pt", "baidu/ERNIE-4.5-VL-424B-A47B-PT"),
        ("ERNIE-4.5-0.3B", "baidu/ERNIE-4.5-0.3B-PT"),
        ("ERNIE-4.5-300B", "baidu/ERNIE-4.5-300B-A47B-PT"),
        ("ERNIE-4.5-VL-28B", "baidu/ERNIE-4.5-VL-28B-A3B-PT"),
        ("ERNIE-21B-A3B-Thinking", "baidu/ERNIE-4.5-21B-A3B-Thinking"),
        ("ERNIE-4.5-300B-2Bits-Paddle", "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"),
        ("PaddlePaddle/ERNIE-4.5-300B-A47B", "baidu/ERNIE-4.5-300B-A47B-PT"),
        ("ernie45/tiny-dens", "ernie45/tiny-dense"),
        ("tiny_moe", "ernie45/tiny-moe"),
    ],
)
def test_a_near_miss_is_suggested_first(near_miss: str, meant: str) -> None:
    assert suggest(near_miss)[0] == meant


def test_the_same_name_under_another_organisation_is_the_one_suggestion() -> None:
    assert suggest("PaddlePaddle/ERNIE-4.5-0.3B-Paddle") == ("baidu/ERNIE-4.5-0.3B-Paddle",)
    assert suggest("badiu/ernie-4.5-0.3b-pt") == ("baidu/ERNIE-4.5-0.3B-PT",)


@pytest.mark.parametrize("name", ["", "baidu", "meta/llama-3-8b", "gpt2"])
def test_other_models_get_no_suggestion(name: str) -> None:
    assert suggest(name) == ()
    assert did_you_mean(name) == ""


def test_a_hint_quotes_the_suggestion() -> None:
    assert did_you_mean("tiny_dense") == "did you mean 'ernie45/tiny-dense'?"


# Without torch, and on paper


def test_listing_loads_no_torch() -> None:
    program = (
        "import sys, ernie45; assert len(ernie45.list_models()) > 27; assert ernie45.ModelInfo\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_page_about_shapes_is_right() -> None:
    rows = [line.strip("|").split("|") for line in (DOCS / "models.md").read_text().splitlines() if line[:3] == "| `"]
    assert len(rows) > 10
    families = ["0.3B", "21B-A3B", "300B-A47B", "VL-28B-A3B", "VL-424B-A47B"]
    for name, *cells in rows:
        fields = [FAMILIES[family].get(name.strip(" `")) for family in families]
        for cell, parameter in zip(cells, fields, strict=True):
            if parameter is None:
                assert cell.strip() == ""
            else:
                value = json.dumps(parameter.value).strip("[]")
                assert cell.strip() == value + (" *" if parameter.status == "derived" else "")
