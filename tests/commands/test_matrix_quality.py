"""Single matrices in every scheme, beside Q4_0 and beside numbers worked out from the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie45 import catalogue
from ernie45.checkpoint import read
from ernie45.commands.matrix_quality import ALL, SCHEMES, matrix_quality, q4_0
from ernie45.commands.quality_report import LayersReport, MatrixQuality
from ernie45.errors import InvalidRequestError, ModelNotFoundError

KINDS = [
    "embedding",
    "attention q, k, v",
    "attention out",
    "dense MLP gate, up",
    "dense MLP down",
    "routed expert gate, up",
    "routed expert down",
    "shared expert gate, up",
    "shared expert down",
    ALL,
]


@pytest.fixture(scope="module")
def report() -> LayersReport:
    entry = catalogue.find("ernie45/tiny-moe")
    assert entry is not None
    return matrix_quality(catalogue.built_in_folder(entry))


def cells(report: LayersReport) -> dict[tuple[str, str], MatrixQuality]:
    return {(row.kind, row.scheme): row for row in report.rows}


def test_every_kind_in_every_scheme(report: LayersReport) -> None:
    found = cells(report)
    assert list(dict.fromkeys(kind for kind, _ in found)) == KINDS
    assert len(found) == len(KINDS) * len(SCHEMES)
    assert report.layers == (0, 1, 2, 3)
    assert found["attention q, k, v", "int8"].num_matrices == 12
    assert found["routed expert gate, up", "int4"].num_matrices == 6  # the first layer is dense
    assert report.notes == ()


def test_errors_are_of_the_order_of_the_bits(report: LayersReport) -> None:
    found = cells(report)
    for kind in KINDS:
        int8, bnb_int8, int4, nf4, other = (found[kind, scheme] for scheme in SCHEMES)
        assert 0.003 < int8.weight_error < 0.02
        assert bnb_int8.weight_error == pytest.approx(int8.weight_error, rel=0.05)
        assert int8.product_error > int8.weight_error  # the inputs are rounded too
        assert 0.05 < int4.weight_error < other.weight_error < 0.11
        assert 0.05 < nf4.weight_error < 0.13
        for row in (int4, nf4, other):
            assert row.product_error == pytest.approx(row.weight_error, rel=0.1)
        assert int4.bits <= nf4.bits == other.bits == 4.5
        assert 8 < int8.bits < 8.4


def test_numbers_are_those_of_the_file(small_folder_path: Path) -> None:
    report = matrix_quality(small_folder_path, max_layers=1)
    weight = (
        load_file(small_folder_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].bfloat16().float()
    )
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    row = cells(report)["dense MLP down", "int8"]
    assert row.weight_error == pytest.approx(float((rounded - weight).norm() / weight.norm()), rel=1e-4)
    assert row.bits == 8 + 32 / weight.shape[1]
    other = cells(report)["dense MLP down", "Q4_0"]
    assert other.weight_error == pytest.approx(float((q4_0(weight) - weight).norm() / weight.norm()), rel=1e-4)


def test_q4_0_by_hand() -> None:
    weight = torch.zeros(2, 32)
    weight[0, :6] = torch.tensor([-4.0, 4.0, 0.26, -0.26, 0.24, 3.4])
    expected = torch.zeros(2, 32)
    expected[0, :6] = torch.tensor([-4.0, 3.5, 0.5, -0.5, 0.0, 3.5])  # steps of 1/2, from -8 to 7
    assert torch.equal(q4_0(weight), expected)


def test_a_scheme_that_does_not_divide_a_matrix_is_left_out(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "odd", hidden_size=36, tokenizer=False)
    found = cells(matrix_quality(folder))
    assert ("attention q, k, v", "int4") not in found
    assert ("attention out", "int4") in found  # [36, 64]
    assert ("attention q, k, v", "int8") in found


def test_a_head_of_its_own(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False, tokenizer=False, num_hidden_layers=3)
    report = matrix_quality(folder, max_layers=2)
    assert report.layers == (0, 2)
    assert cells(report)["head", "int4"].num_matrices == 1


def test_the_first_rows_stand_for_a_large_matrix(small_folder_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", 4 * 32 * 200)  # of the embedding's 384 rows
    table = load_file(small_folder_path / "model.safetensors")["model.embed_tokens.weight"].bfloat16().float()[:192]
    row = cells(matrix_quality(small_folder_path, max_layers=1))["embedding", "Q4_0"]
    assert row.weight_error == pytest.approx(float((q4_0(table) - table).norm() / table.norm()), rel=1e-4)


def test_tables_and_json(report: LayersReport) -> None:
    tables = str(report).split("\n\n")
    assert [table.split("  ")[0] for table in tables[1:]] == ["BITS A WEIGHT", "WEIGHT ERROR", "PRODUCT ERROR"]
    line = next(line for line in tables[2].splitlines() if line.startswith(ALL))
    assert f"{cells(report)[ALL, 'int4'].weight_error:.2%}" in line.split()
    assert len(json.loads(report.json())["rows"]) == len(report.rows)


def test_mistakes_are_explained(small_folder_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="max_layers is 0"):
        matrix_quality(small_folder_path, max_layers=0)
    with pytest.raises(ModelNotFoundError):
        matrix_quality(tmp_path / "nothing")
