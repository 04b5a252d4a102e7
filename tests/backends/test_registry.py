"""Architectures that another package brings, through the facade."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from ernie45 import ErnieModel
from ernie45.backends import register
from ernie45.errors import ConfigError, InvalidRequestError, TensorError


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The toy package, imported as its users would; what it registered goes with the test."""
    monkeypatch.setattr("ernie45.backends.registry._registered", {})
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("toy_backend", None)
    return importlib.import_module("toy_backend")


def write_counter(folder: Path, step: float, **more: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy-counter", "vocab_size": 50}))
    save_file({"step": torch.tensor([step]), **more}, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("toy")
def test_a_package_of_its_own_brings_a_backend(tmp_path: Path) -> None:
    with ErnieModel.from_pretrained(write_counter(tmp_path / "counter", 3.0), progress=False) as model:
        assert model.generate([7], max_new_tokens=4, temperature=0).token_ids == (10, 13, 16, 19)
        batch = model.batch_generate([[0], [48]], max_new_tokens=2, temperature=0)
    assert [completion.token_ids for completion in batch] == [(3, 6), (1, 4)]


def test_without_the_package_its_model_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type 'toy-counter' is not ERNIE 4"):
        ErnieModel.from_pretrained(write_counter(tmp_path / "counter", 3.0))


@pytest.mark.usefixtures("toy")
def test_a_tensor_that_the_package_does_not_ask_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="holds a tensor 'other'"):
        ErnieModel.from_pretrained(write_counter(tmp_path / "counter", 3.0, other=torch.ones(2)))


def test_a_model_type_is_registered_once(toy: ModuleType) -> None:
    with pytest.raises(InvalidRequestError, match="'toy-counter' is registered already"):
        register("toy-counter", parse_spec=toy.parse_spec, build=toy.build)


def test_a_package_is_asked_before_our_own(toy: ModuleType, tmp_path: Path) -> None:
    register("ernie4_5", parse_spec=toy.parse_spec, build=toy.build)
    folder = write_counter(tmp_path / "counter", 2.0)
    (folder / "config.json").write_text(json.dumps({"model_type": "ernie4_5", "vocab_size": 50}))
    with ErnieModel.from_pretrained(folder, progress=False) as model:
        assert model.generate([1], max_new_tokens=2, temperature=0).token_ids == (3, 5)
