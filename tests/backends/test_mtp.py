"""The head for multi-token prediction against the one that `tools/` trains with transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from ernie45.backends.base import BuildOptions
from ernie45.backends.decoder import Decoder, Norm, NormedHead
from ernie45.backends.kv_cache import KVCache
from ernie45.backends.mtp import MtpHead, build_mtp_head
from ernie45.backends.weights import WeightBuilder
from ernie45.engine.batches import Run, text_batch
from ernie45.kernels.linear import DenseEmbedding, DenseLinear
from ernie45.spec import ModelSpec, parse_spec
from ernie45.types.placement import Placement

TOOLS_FOLDER = Path(__file__).parents[2] / "tools"
SHAPE: Mapping[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 20,
}


class Tensors:
    """Gives tensors by name out of a dictionary."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        out.copy_(torch.cat([self._tensors[name] for name in parts]))


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trained head's class on random weights, with a trunk."""
    monkeypatch.syspath_prepend(str(TOOLS_FOLDER))
    from tiny_mtp import MtpHead as ReferenceHead

    torch.manual_seed(3)
    config = Ernie4_5_MoeConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})

    class Reference:
        trunk = Ernie4_5_MoeForCausalLM(config).eval()
        head = ReferenceHead(config).eval()

    with torch.no_grad():
        for module in (Reference.trunk, Reference.head):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Reference


def load(reference: Any) -> tuple[MtpHead, ModelSpec]:
    spec = parse_spec({**SHAPE, "model_type": "ernie4_5_moe", "rope_theta": 500000.0, "tie_word_embeddings": True})
    options = BuildOptions.unquantised(spec, dtype=torch.float32, device="cpu", context_tokens=64)
    tensors = {f"model.{name}": tensor.detach() for name, tensor in reference.head.state_dict().items()}
    trunk = reference.trunk
    decoder = Decoder(
        spec=spec,
        embedding=DenseEmbedding(trunk.model.embed_tokens.weight.detach()),
        stages=(),
        head=NormedHead(
            norm=Norm(weight=trunk.model.norm.weight.detach(), eps=spec.rms_norm_eps),
            linear=DenseLinear(trunk.lm_head.weight.detach()),
        ),
        head_device=torch.device("cpu"),
    )
    return build_mtp_head(WeightBuilder(spec, Tensors(tensors), options), decoder), spec


def run(head: MtpHead, spec: ModelSpec, rows: Sequence[tuple[Sequence[int], Tensor]], edges: Sequence[int]) -> Tensor:
    """Logits after every token of each row's ids [T] beside states [T, h], in steps that end at `edges`."""
    cache = KVCache.allocate(
        spec,
        num_slots=len(rows),
        context_tokens=64,
        dtype=torch.float32,
        kv_dtype="auto",
        placement=Placement.on("cpu", 1),
    )
    parts: list[list[Tensor]] = [[] for _ in rows]
    for start, end in zip((0, *edges), edges, strict=False):
        runs = [
            Run(slot=slot, start=start, token_ids=ids[start:end], wanted=range(end - start))
            for slot, (ids, _) in enumerate(rows)
        ]
        logits = head(text_batch(runs, cache, head.device), torch.cat([hidden[start:end] for _, hidden in rows]))
        for row, part in zip(parts, logits.split(end - start), strict=True):
            row.append(part)
    return torch.stack([torch.cat(row) for row in parts])


@pytest.mark.parametrize("edges", [(12,), (5, 6, 12)])
def test_logits_are_those_of_the_trained_class(reference: Any, edges: tuple[int, ...]) -> None:
    head, spec = load(reference)
    ids = torch.randint(0, 90, (2, 13))
    hidden = torch.randn(2, 12, 40)
    trunk = reference.trunk.model
    with torch.no_grad():
        states = reference.head(hidden, trunk.embed_tokens(ids[:, 1:]), trunk.rotary_emb)
        expected = reference.trunk.lm_head(trunk.norm(states))
    rows = [(row[1:].tolist(), states) for row, states in zip(ids, hidden, strict=True)]
    torch.testing.assert_close(run(head, spec, rows, edges), expected, atol=1e-4, rtol=1e-4)
