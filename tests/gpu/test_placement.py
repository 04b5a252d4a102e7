"""A decoder whose parts lie on a CUDA GPU and on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement
from tests.backends.test_placement import DENSE, MOE, VL, Case, logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]

ON_CPU = Placement.on("cpu", 3)
PLACEMENTS = {
    "experts on the CPU": replace(Placement.on("cuda:0", 3), experts=("cpu",) * 3),
    "the first layers on the GPU": replace(ON_CPU, embedding="cuda:0", layers=("cuda:0", "cuda:0", "cpu")),
    "the embedding on the CPU": replace(Placement.on("cuda:0", 3), embedding="cpu"),
    "the tower on the GPU": replace(ON_CPU, vision="cuda:0"),
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=list(PLACEMENTS))
@pytest.mark.parametrize("shape", [DENSE, MOE, VL], ids=["dense", "experts", "pictures"])
def test_a_split_gives_the_logits_of_the_cpu(shape: ModelSpec, placement: Placement) -> None:
    case = Case(shape=shape, placement=placement)
    split, expected = logits(case), logits(replace(case, placement=ON_CPU))
    assert {tensor.device for tensor in split} == {torch.device(placement.head)}
    for one, other in zip(split, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)
