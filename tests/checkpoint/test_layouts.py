"""-PT tensors written in Paddle's two layouts by an independent writer come back bit for bit under their -PT names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie45 import ErnieModel
from ernie45.checkpoint import read
from ernie45.checkpoint.headers import read_headers, read_json
from ernie45.checkpoint.layouts import Layout, detect_layout
from ernie45.checkpoint.read import TensorReader
from ernie45.errors import TensorError
from ernie45.spec import parse_spec
from tests.paddle_files import (
    CONFIG,
    EXPERTS,
    Array,
    FileLayout,
    FloatDtype,
    lay_out,
    random_pt,
    write_checkpoint,
    write_stored,
)
from tests.vl_files import PaddleNames, hub_config, hub_tensors, write_hub, write_paddle
from tests.vl_models import random_reference

MOE = {**CONFIG, **EXPERTS}
CASES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "dense": (CONFIG, {}),
    "experts": (MOE, {}),
    "as many kv heads as heads": ({**CONFIG, "num_key_value_heads": 4}, {}),
    "one kv head": ({**CONFIG, "num_key_value_heads": 1}, {}),
    "biases": ({**CONFIG, "use_bias": True}, {}),
    "biases, as many kv heads": ({**CONFIG, "use_bias": True, "num_key_value_heads": 4}, {}),
    "biases, experts without": ({**MOE, "use_bias": True}, {}),
    "biases, experts too": ({**MOE, "use_bias": True}, {"expert_biases": True}),
    "untied": ({**MOE, "tie_word_embeddings": False}, {}),
    "vocabulary as wide as hidden": ({**CONFIG, "vocab_size": 24, "tie_word_embeddings": False}, {}),
    "tied, vocabulary as wide as hidden": ({**CONFIG, "vocab_size": 24}, {}),
    "square everything": (
        {**CONFIG, "hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4, "vocab_size": 32},
        {},
    ),
    "one layer in two has experts, none shared": (
        {**MOE, "num_hidden_layers": 4, "moe_layer_interval": 2, "moe_num_shared_experts": 0, "moe_layer_end_index": 3},
        {},
    ),
    "no correction": ({**MOE, "moe_use_aux_free": False}, {}),
    "multi-token prediction": ({**MOE, "num_nextn_predict_layers": 1, "num_key_value_heads": 4}, {"mtp": True}),
}
FORMATS: list[tuple[FileLayout, FloatDtype, int]] = [
    ("paddle", "F32", 1),
    ("paddle", "U16", 3),
    ("paddleformers", "F32", 2),
    ("paddleformers", "BF16", 1),
    ("pt", "U16", 2),
]


def open_folder(folder: Path) -> tuple[TensorReader, Layout]:
    config, index = read_json(folder / "config.json"), read_headers(folder)
    layout = detect_layout(index, config, parse_spec(config))
    return TensorReader(index, layout), layout


def read_all(reader: TensorReader, wanted: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full(values.shape, torch.nan) for name, values in wanted.items()}
    for name, out in tensors.items():
        reader.read_into(out, {name: len(out)})
    return tensors


@pytest.mark.parametrize(("layout", "dtype", "num_shards"), FORMATS, ids=[f"{name}-{d}" for name, d, _ in FORMATS])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, layout: FileLayout, dtype: FloatDtype, num_shards: int
) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", 1024)  # so that small tensors are read in several pieces
    config, extras = CASES[case]
    tensors = random_pt(config, **extras)
    write_checkpoint(tmp_path, tensors, config, layout=layout, dtype=dtype, num_shards=num_shards)
    reader, found = open_folder(tmp_path)
    assert found.name == layout
    for name, values in read_all(reader, tensors).items():
        assert name in reader
        assert np.array_equal(values.numpy(), tensors[name]), name


@pytest.mark.parametrize(("layout", "dtype", "num_shards"), FORMATS[:4], ids=[f"{n}-{d}" for n, d, _ in FORMATS[:4]])
def test_what_a_file_fuses_is_read_together_into_rows(
    tmp_path: Path, layout: FileLayout, dtype: FloatDtype, num_shards: int
) -> None:
    config = {**MOE, "use_bias": True}
    tensors = random_pt(config, expert_biases=True)
    reader, _ = open_folder(
        write_checkpoint(tmp_path, tensors, config, layout=layout, dtype=dtype, num_shards=num_shards)
    )
    for kind in ("weight", "bias"):
        for names in (
            [f"model.layers.2.self_attn.{leaf}_proj.{kind}" for leaf in "qkv"],
            [f"model.layers.0.mlp.{leaf}_proj.{kind}" for leaf in ("gate", "up")],
            [f"model.layers.1.mlp.experts.3.{leaf}_proj.{kind}" for leaf in ("gate", "up")],
            [f"model.layers.1.mlp.shared_experts.{leaf}_proj.{kind}" for leaf in ("up", "gate")],  # the other way round
        ):
            wanted = np.concatenate([tensors[name] for name in names])
            for out_dtype in (torch.float32, torch.bfloat16):
                out = torch.full(wanted.shape, torch.nan, dtype=out_dtype)
                reader.read_into(out, {name: len(tensors[name]) for name in names})
                assert np.array_equal(out.float().numpy(), wanted), names


@pytest.mark.parametrize("layout", ["paddle", "paddleformers", "pt"])
def test_a_stored_tensor_is_told_by_what_it_holds(tmp_path: Path, layout: FileLayout) -> None:
    config = {**MOE, "use_bias": True}
    tensors = random_pt(config, mtp=True)
    _, found = open_folder(write_checkpoint(tmp_path, tensors, config, layout=layout))
    stored = lay_out(tensors, config, layout)
    held = [name for key in stored for name in found.names_in(key)]
    assert sorted(held) == sorted({*tensors, *["lm_head.weight"] * (layout != "pt")})
    for key in stored:
        assert {found.locate(name).key for name in found.names_in(key)} == {key}


def test_an_untied_head_of_pt_files_may_lie_either_way(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": False}
    tensors = random_pt(config)
    turned = {**tensors, "lm_head.weight": tensors["lm_head.weight"].T}
    reader, _ = open_folder(write_checkpoint(tmp_path, turned, config, layout="pt"))
    assert np.array_equal(
        read_all(reader, {"lm_head.weight": tensors["lm_head.weight"]})["lm_head.weight"], tensors["lm_head.weight"]
    )


END_TO_END = ["dense", "biases, as many kv heads", "biases, experts too", "multi-token prediction", "untied"]


@pytest.mark.parametrize("case", END_TO_END)
def test_the_logits_are_those_of_the_pt_files(tmp_path: Path, case: str) -> None:
    config, extras = CASES[case]
    tensors = random_pt(config, **extras)
    logits = []
    for layout, dtype, num_shards in [("pt", "F32", 1), *FORMATS[1:3]]:
        folder = tmp_path / f"{layout}-{dtype}"
        write_checkpoint(folder, tensors, config, layout=layout, dtype=dtype, num_shards=num_shards)
        with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
            assert model.load_report.layout == layout
            logits.append(model.logits([5, 1, 19, 7, 7, 23]))
    assert logits[0].std() > 0.1
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


# Vision-language models


@pytest.fixture(scope="module")
def reference() -> Any:
    return random_reference(text={"num_hidden_layers": 2, "tie_word_embeddings": False}, tie_word_embeddings=False)


def torch_oriented(reference: Any) -> dict[str, Array]:
    """Its tensors by their -PT names, every linear weight [out, in]."""
    return {name: values.T if ".mlp.gate." in name else values for name, values in hub_tensors(reference).items()}


def check_vision_folder(folder: Path, layout: str, wanted: Mapping[str, Array]) -> None:
    reader, found = open_folder(folder)
    assert found.name == layout
    for name, values in read_all(reader, wanted).items():
        assert name in reader
        assert np.array_equal(values.numpy(), wanted[name]), name
    held = [(name, key) for key in read_headers(folder).tensors for name in found.names_in(key)]
    assert sorted(name for name, _ in held) == sorted(wanted)
    assert all(found.locate(name).key == key for name, key in held)


def test_a_published_vision_language_model_comes_back(tmp_path: Path, reference: Any) -> None:
    check_vision_folder(write_hub(tmp_path, reference, num_shards=2), "pt", torch_oriented(reference))


def test_transformers_own_form_comes_back(tmp_path: Path, reference: Any) -> None:
    reference.save_pretrained(tmp_path)
    assert any(key.startswith("model.vision_model.") for key in read_headers(tmp_path).tensors)
    check_vision_folder(tmp_path, "pt", torch_oriented(reference))


@pytest.mark.parametrize("names", ["ernie.", "ernie. before the tower too", "bare resampler"])
def test_a_vision_language_model_of_paddle_comes_back(tmp_path: Path, reference: Any, names: PaddleNames) -> None:
    check_vision_folder(write_paddle(tmp_path, reference, names=names), "paddle", torch_oriented(reference))


@pytest.mark.parametrize(
    ("moved", "to"),
    [
        ("vision_model.ln.weight", "ernie.vision_model.ln.weight"),
        ("ernie.resampler_model.mlp.bias", "resampler_model.mlp.bias"),
    ],
)
def test_parts_under_two_prefixes_are_a_contradiction(tmp_path: Path, reference: Any, moved: str, to: str) -> None:
    write_paddle(tmp_path / "whole", reference)
    index = read_headers(tmp_path / "whole")
    stored = {key: np.zeros(info.shape, dtype=np.float32) for key, info in index.tensors.items()}
    stored[to] = stored.pop(moved)
    folder = write_stored(tmp_path / "mixed", stored, {**hub_config(reference), "paddleformers_version": "0.1"})
    with pytest.raises(TensorError, match="some tensor names begin with") as caught:
        open_folder(folder)
    assert caught.value.hint
