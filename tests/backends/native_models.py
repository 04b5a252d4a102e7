"""Small text models of random weights in shapes that the native kernels take, and in some that they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ernie45.backends.base import BuildOptions
from ernie45.backends.kv_cache import DenseStore, Int8Store, KVCache
from ernie45.backends.native_stage import NativeStage
from ernie45.backends.text import TextBackend, build_text
from ernie45.engine.batches import Run, text_batch
from ernie45.memory.budget import KVDtype
from ernie45.presets import PRESETS
from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement
from tests.backends.test_placement import Stored
from tests.backends.test_text import EXPERTS, spec
from tests.kernels.kv_blocks import keys_from_blocks, values_from_blocks

CONTEXT_TOKENS = 96
NUM_SLOTS = 4

SHAPES: Mapping[str, ModelSpec] = {
    "dense": spec(num_hidden_layers=3),
    "experts": spec(**EXPERTS, num_hidden_layers=3),
    "biases": spec(use_bias=True, hidden_size=96, intermediate_size=192, head_dim=32, num_attention_heads=6),
    "one key head": spec(hidden_size=160, intermediate_size=64, num_attention_heads=5, num_key_value_heads=1),
    "heads of 96": spec(hidden_size=64, head_dim=96, num_attention_heads=3, num_key_value_heads=3, vocab_size=65),
    "heads of 128": spec(hidden_size=32, head_dim=128, vocab_size=63),
    "heads of 256": spec(hidden_size=288, head_dim=256, num_attention_heads=2, num_key_value_heads=1),
    "no shared expert": spec(**{**EXPERTS, "moe_num_shared_experts": 0, "moe_k": 6, "moe_layer_start_index": 0}),
    "one expert": spec(**{**EXPERTS, "moe_num_experts": 1, "moe_k": 1, "moe_intermediate_size": 64}),
}
# The second of these still has matrices in panels, which torch's layers then multiply with.
OTHER_SHAPES: Mapping[str, ModelSpec] = {
    "hidden states of 48": spec(hidden_size=48),
    "heads of 16": spec(head_dim=16),
    "heads of 80": spec(head_dim=80),
    "an MLP of 96": spec(intermediate_size=96),
    "an MLP of 40": spec(intermediate_size=40),
    "experts of 96": spec(**{**EXPERTS, "moe_intermediate_size": 96}),
    "experts of 20": spec(**{**EXPERTS, "moe_intermediate_size": 20}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    backend: TextBackend
    cache: KVCache

    @property
    def is_native(self) -> bool:
        return all(isinstance(stage, NativeStage) for stage in self.backend._decoder.stages)

    def step(self, runs: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """`runs` are (slot, first position, ids) -> logits [N, V] after every token."""
        rows = [Run(slot=slot, start=start, token_ids=ids, wanted=range(len(ids))) for slot, start, ids in runs]
        return self.backend.forward(text_batch(rows, self.cache, self.backend.device)).logits

    def kept(self, slot: int, num_tokens: int) -> list[Tensor]:
        """What the native layers' cache holds of a slot's tokens."""
        stored = []
        for stores, in_order in ((self.cache.keys, keys_from_blocks), (self.cache.values, values_from_blocks)):
            for store in stores:
                if isinstance(store, Int8Store):
                    stored += [in_order(store.codes[slot]), store.scales[slot]]
                else:
                    assert isinstance(store, DenseStore)
                    stored.append(in_order(store.x[slot]))
        return [tensor[:, :num_tokens].clone() for tensor in stored]


def build(shape: ModelSpec, preset: str, *, dtype: torch.dtype = torch.bfloat16, kv_dtype: KVDtype = "auto") -> Model:
    placement = Placement.on("cpu", shape.num_layers)
    options = BuildOptions(dtype=dtype, placement=placement, preset=PRESETS[preset], context_tokens=CONTEXT_TOKENS)
    cache = KVCache.allocate(
        shape,
        num_slots=NUM_SLOTS,
        context_tokens=CONTEXT_TOKENS,
        dtype=dtype,
        kv_dtype=kv_dtype,
        placement=placement,
    )
    return Model(backend=build_text(shape, Stored(), options), cache=cache)


def prefill(model: Model, ids: Sequence[int], edges: Sequence[int], slot: int = 0) -> Tensor:
    """Logits [T, V] after every token, run in steps that end at `edges`."""
    return torch.cat([model.step([(slot, start, ids[start:end])]) for start, end in pairwise((0, *edges))])


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
