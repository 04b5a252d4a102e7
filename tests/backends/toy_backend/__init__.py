"""A package of its own that brings an architecture to ernie45: each token is followed by the next number, times a step.

Importing it registers `model_type` "toy-counter", whose checkpoints hold one tensor, the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ernie45.backends import Batch, BuildOptions, Step, TensorSource, register
from ernie45.presets import WeightPart
from ernie45.spec import ModelSpec


class CountingBackend:
    def __init__(self, spec: ModelSpec, step: torch.Tensor) -> None:
        self.spec = spec
        self.dtype = step.dtype
        self.device = step.device
        self.weight_bytes: Mapping[WeightPart, int] = {"embedding": step.element_size()}
        self._step = step

    def forward(self, batch: Batch) -> Step:
        following = (batch.token_ids[batch.wanted] + int(self._step)) % self.spec.vocab_size
        return Step(logits=F.one_hot(following, self.spec.vocab_size).float())


def parse_spec(config: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec(
        model_type="toy-counter",
        hidden_size=2,
        intermediate_size=2,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        vocab_size=config["vocab_size"],
        max_context_tokens=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        use_bias=False,
        tied=True,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
    )


def build(spec: ModelSpec, source: TensorSource, options: BuildOptions) -> CountingBackend:
    step = torch.empty(1, dtype=options.dtype, device=options.placement.embedding)
    source.read_into(step, {"step": 1})
    return CountingBackend(spec, step)


register("toy-counter", parse_spec=parse_spec, build=build)
