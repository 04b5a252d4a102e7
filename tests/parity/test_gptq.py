"""Logits of GPTQ checkpoints against those of the float32 weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from tests.gptq_files import write_gptq_folder
from tests.paddle_files import CONFIG, EXPERTS, random_pt, write_checkpoint

DENSE = {**CONFIG, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MOE = {**DENSE, **EXPERTS, "moe_intermediate_size": 32}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "dense, act-order, each matrix its own": (DENSE, {"order": "separate"}),
    "experts": (MOE, {"plain": "shared_experts"}),
    "experts, act-order": (MOE, {"order": "shared", "symmetric": False}),
    "experts, v2, asymmetric": (MOE, {"version": 2, "symmetric": False}),
    "dense, one group, biases": ({**DENSE, "use_bias": True}, {"group_size": -1}),
}


def load(folder: Path) -> ErnieModel:
    return ErnieModel.from_pretrained(folder, dtype="float32", quantization="none", device="cpu", progress=False)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_weights(case: str, tmp_path: Path) -> None:
    config, options = CASES[case]
    source = write_checkpoint(tmp_path / "source", random_pt(config), config, layout="pt")
    write_gptq_folder(source, tmp_path / "gptq", tmp_path / "reference", **options)
    ids = torch.randint(3, config["vocab_size"], (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with load(tmp_path / "source") as model:
        unquantised = model.logits(ids)
    with load(tmp_path / "reference") as model:
        expected, float_bytes = model.logits(ids), model.load_report.weight_bytes
    with load(tmp_path / "gptq") as model:
        torch.testing.assert_close(model.logits(ids), expected, atol=1e-3, rtol=0)
        assert model.load_report.weight_bytes < 0.5 * float_bytes
        logits = model.logits(ids)
        model.save_pretrained(tmp_path / "saved", progress=False)
    with load(tmp_path / "saved") as model:
        assert torch.equal(model.logits(ids), logits)
        assert model.plan.preset == "gptq"
    assert (unquantised - expected).abs().max() > 0.02
