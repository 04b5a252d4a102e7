"""Packed folders for tests: opened, changed tensor by tensor, and as version 1 of the format had them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45.checkpoint.headers import read_json
from ernie45.checkpoint.open import Checkpoint, open_checkpoint, open_source, open_survey, read_config
from ernie45.checkpoint.packed import PackedCheckpointSource
from ernie45.checkpoint.read import PackedSource
from ernie45.errors import TensorError
from ernie45.quantization.panels import PanelInt4, in_rows
from ernie45.spec import parse_spec


def opened(folder: Path) -> Checkpoint:
    config = read_config(folder)
    return open_checkpoint(folder, config, parse_spec(config))


def source_of(folder: Path, **options: Any) -> PackedCheckpointSource:
    source = open_source(opened(folder), **options)
    assert isinstance(source, PackedCheckpointSource)
    return source


def check_refused(folder: Path, parts: Mapping[str, int], in_features: int, device: torch.device, message: str) -> None:
    """That a matrix is neither read nor, on "meta", surveyed."""
    checkpoint = opened(folder)
    source = open_survey(checkpoint)[0] if device.type == "meta" else open_source(checkpoint)
    assert isinstance(source, PackedSource)
    with pytest.raises(TensorError, match=message):
        source.read_packed(parts, in_features, device)


def change_tensors(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Put these into a folder of one file, in place of those of the same names, or take them away."""
    path = folder / "model.safetensors"
    stored: dict[str, torch.Tensor | None] = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


def stored_panels(stored: Mapping[str, torch.Tensor], name: str) -> PanelInt4:
    """A matrix of random weights, whose rows have scales and those that fill the last panel have none."""
    panels, row_scales = stored[f"{name}.panels"], stored[f"{name}.row_scales"]
    num_rows, num_groups = int(row_scales.count_nonzero()), 4 * panels.shape[1] // 17
    return PanelInt4(panels=panels, row_scales=row_scales, out_features=num_rows, in_features=32 * num_groups)


def as_version_1(folder: Path, target: Path) -> Path:
    """A copy of a folder of one file, with 4-bit matrices in rows."""
    shutil.copytree(folder, target)
    stored = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".panels") for key in stored if key.endswith(".panels")]:
        rows = in_rows(stored_panels(stored, name))
        del stored[f"{name}.panels"]
        stored |= {f"{name}.{leaf}": tensor for leaf, tensor in rows.tensors().items()}
    save_file(stored, target / "model.safetensors")
    config = read_json(target / "config.json")
    config["quantization_config"]["format_version"] = 1
    (target / "config.json").write_text(json.dumps(config))
    return target


def move_data(folder: Path, num_bytes: int) -> None:
    """Have all tensors of a folder of one file begin so many bytes later in it."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + header_bytes] + b" " * num_bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + header_bytes :])
