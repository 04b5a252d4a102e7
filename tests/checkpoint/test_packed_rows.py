"""4-bit matrices in rows, as version 1 of the packed format had all of them and GPTQ's are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie45.checkpoint.headers import read_json
from ernie45.errors import TensorError
from ernie45.presets import PRESETS
from ernie45.quantization.packed import PackedInt4
from ernie45.saving import save_checkpoint
from tests.checkpoint.test_packed import CPU, META, QKV, QKV_NAME, WIDE, change
from tests.packed_files import as_version_1, change_tensors, check_refused, source_of
from tests.paddle_files import random_pt, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", random_pt(WIDE), WIDE, layout="pt", dtype="BF16")
    save_checkpoint(source, tmp_path / "packed", PRESETS["int4"], progress=False)
    return as_version_1(tmp_path / "packed", tmp_path / "rows")


def int4_of(folder: Path) -> PackedInt4:
    pieces = source_of(folder).read_packed(QKV, 64, CPU)
    assert pieces is not None
    (packed,) = pieces
    assert isinstance(packed, PackedInt4)
    return packed


@pytest.mark.parametrize("version", [1, 2])
def test_matrices_in_rows_come_as_they_are_stored(folder: Path, version: int) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"]["format_version"] = version
    (folder / "config.json").write_text(json.dumps(config))
    packed, stored = int4_of(folder), load_file(folder / "model.safetensors")
    assert set(packed.tensors()) == {"codes", "scales", "row_scales"}
    for leaf, tensor in packed.tensors().items():
        assert torch.equal(tensor, stored[f"{QKV_NAME}.{leaf}"])


DAMAGES: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no codes": ({"codes": None}, r"no matrix '.*qkv_proj', but by config\.json it is packed as 'int4'"),
    "no scales": ({"scales": None}, r"no tensor '.*qkv_proj\.scales'"),
    "no row scales": ({"row_scales": None}, r"no tensor '.*qkv_proj\.row_scales'"),
    "other rows": (
        {"codes": torch.zeros(64, 32, dtype=torch.uint8)},
        r"qkv_proj\.codes' is stored as U8 \[64, 32\], but the model needs U8 \[128, 32\]",
    ),
    "other dtype": ({"row_scales": torch.zeros(128, dtype=torch.float64)}, "stored as F64 .* needs F32"),
    "8 bits of another width": (
        {"codes": torch.zeros(128, 32, dtype=torch.int8)},
        r"stored as I8 \[128, 32\], but the model needs I8 \[128, 64\]",
    ),
    "groups that do not divide": (
        {"scales": torch.zeros(128, 3, dtype=torch.int8)},
        "I8 with 3 groups in a row, which 64 inputs do not divide into",
    ),
    "scales of another kind": ({"scales": torch.zeros(128, 2, dtype=torch.int32)}, "is I32 with 2 groups"),
}


@pytest.mark.parametrize(("tensors", "message"), DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_what_does_not_fit_is_named(
    folder: Path, tensors: Mapping[str, torch.Tensor | None], message: str, device: torch.device
) -> None:
    change(folder, tensors)
    check_refused(folder, QKV, 64, device, message)


VALUES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "a group's scale": ({"scales": torch.full((128, 2), -128, dtype=torch.int8)}, r"\.scales' holds -128"),
    "a row's scale": ({"row_scales": torch.full((128,), torch.nan)}, r"row_scales' holds 128 values that are not fin"),
    "scales without rows'": (
        {"scales": torch.full((128, 2), torch.inf, dtype=torch.float16)},
        r"\.scales' holds 256 values that are not finite",
    ),
    "8-bit codes": (
        {"codes": torch.full((128, 64), -128, dtype=torch.int8), "scales": torch.zeros(128)},
        r"codes' holds -128",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), VALUES.values(), ids=VALUES)
def test_values_that_the_format_has_not_are_refused(
    folder: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    change(folder, tensors)
    with pytest.raises(TensorError, match=message):
        source_of(folder).read_packed(QKV, 64, CPU)


def test_an_order_of_inputs_must_name_each_once(folder: Path) -> None:
    order = torch.arange(64, dtype=torch.int32).flip(0)
    change(folder, {"input_order": order})
    packed = int4_of(folder)
    assert packed.input_order is not None
    order[0] = 10**6
    change(folder, {"input_order": order})
    with pytest.raises(TensorError, match=r"input_order' holds something else than each number below 64 once"):
        source_of(folder).read_packed(QKV, 64, CPU)


def test_matrices_that_could_not_be_joined_are_stored_apart(folder: Path) -> None:
    joined = int4_of(folder).tensors()
    apart = {
        f"{name}.{leaf}": rows.contiguous()
        for leaf, tensor in joined.items()
        for name, rows in zip(QKV, tensor.split(list(QKV.values())), strict=True)
    }
    change_tensors(folder, {**{f"{QKV_NAME}.{leaf}": None for leaf in joined}, **apart})
    pieces = source_of(folder).read_packed(QKV, 64, CPU)
    assert pieces is not None
    assert [piece.out_features for piece in pieces] == [64, 32, 32]
