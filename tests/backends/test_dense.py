"""The dense backend: what it asks of a checkpoint, and that a row's numbers are its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie45.backends.base import Batch, KVCache, Row
from ernie45.backends.dense import DenseBackend, build_dense
from ernie45.kernels.linear import packs
from ernie45.spec import ModelSpec, parse_spec

CPU = torch.device("cpu")


class RandomTensors:
    """Gives every tensor it is asked for random values; remembers the names."""

    def __init__(self, *stored: str) -> None:
        self._stored = stored
        self.asked: dict[str, tuple[int, ...]] = {}
        self._generator = torch.Generator().manual_seed(0)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read_into(self, name: str, out: Tensor) -> None:
        self.asked[name] = tuple(out.shape)
        out.copy_(torch.randn(out.shape, generator=self._generator) * (0.5 if out.dim() == 1 else 0.1))


def spec(**changes: object) -> ModelSpec:
    config = {
        "model_type": "ernie4_5",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 300,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    return parse_spec({**config, **changes})


def build(source: RandomTensors, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> DenseBackend:
    return build_dense(spec, source, dtype=dtype, device=CPU, context_tokens=64)


def decode_batch(rows: dict[int, list[int]], cache: KVCache, backend: DenseBackend) -> Tensor:
    """Prefill each slot's tokens but the last alone, then run all last tokens in one step -> logits [rows, V]."""
    for slot, ids in rows.items():
        backend.forward(batch_of({slot: (ids[:-1], 0)}, cache))
    return backend.forward(batch_of({slot: (ids[-1:], len(ids) - 1) for slot, ids in rows.items()}, cache)).logits


def batch_of(parts: dict[int, tuple[list[int], int]], cache: KVCache) -> Batch:
    ids = [i for tokens, _ in parts.values() for i in tokens]
    ends = torch.tensor([len(tokens) for tokens, _ in parts.values()]).cumsum(0) - 1
    return Batch(
        rows=tuple(Row(slot=slot, start=start, num_tokens=len(ids)) for slot, (ids, start) in parts.items()),
        token_ids=torch.tensor(ids),
        positions=torch.tensor([start + i for tokens, start in parts.values() for i in range(len(tokens))]),
        slots=torch.tensor([slot for slot, (tokens, _) in parts.items() for _ in tokens]),
        wanted=ends,
        cache=cache,
    )


def test_it_asks_for_every_published_tensor_in_its_shape() -> None:
    source = RandomTensors()
    build(source, spec(use_bias=True))
    layer = {
        "input_layernorm.weight": (256,),
        "self_attn.q_proj.weight": (256, 256),
        "self_attn.k_proj.weight": (128, 256),
        "self_attn.v_proj.weight": (128, 256),
        "self_attn.o_proj.weight": (256, 256),
        "post_attention_layernorm.weight": (256,),
        "mlp.gate_proj.weight": (512, 256),
        "mlp.up_proj.weight": (512, 256),
        "mlp.down_proj.weight": (256, 512),
    }
    biases = {name.replace("weight", "bias"): shape[:1] for name, shape in layer.items() if "_proj" in name}
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in {**layer, **biases}.items()}
    assert source.asked == {**expected, "model.embed_tokens.weight": (300, 256), "model.norm.weight": (256,)}


def test_a_stored_head_is_used_whatever_the_config_says_and_asked_for_when_it_is_untied() -> None:
    for tied, stored, read in [
        (False, True, True),
        (True, True, True),
        (None, True, True),
        (False, False, True),  # a real source says that it is missing
        (True, False, False),
        (None, False, False),
    ]:
        source = RandomTensors(*["lm_head.weight"] * stored)
        build(source, spec(tie_word_embeddings=tied))
        assert ("lm_head.weight" in source.asked) == read


@pytest.mark.skipif(not packs(torch.bfloat16, CPU), reason="this CPU has no bf16 arithmetic in oneDNN")
def test_decoding_a_row_gives_the_same_bits_alone_and_among_others() -> None:
    shape = spec()
    backend = build(RandomTensors(), shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    rows = {slot: torch.randint(300, (3 * slot + 2,), generator=generator).tolist() for slot in range(17)}
    cache = KVCache.allocate(shape, num_slots=17, context_tokens=64, dtype=torch.bfloat16, device=CPU)
    together = decode_batch(rows, cache, backend)
    for slot, ids in rows.items():
        assert torch.equal(decode_batch({slot: ids}, cache, backend)[0], together[slot])


def test_what_lies_in_a_slot_from_an_earlier_request_is_never_seen() -> None:
    shape = spec()
    backend = build(RandomTensors(), shape)
    cache = KVCache.allocate(shape, num_slots=1, context_tokens=64, dtype=torch.float32, device=CPU)
    first = decode_batch({0: [5, 6, 7]}, cache, backend)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    assert torch.equal(decode_batch({0: [5, 6, 7]}, cache, backend), first)
