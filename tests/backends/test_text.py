"""The text backend: what it asks of a checkpoint, what experts do, and that a row's numbers are its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from ernie45.backends.base import Batch, BuildOptions, Row
from ernie45.backends.decoder import DenseMLP, ExpertBank, Router
from ernie45.backends.kv_cache import DenseStore, KVCache
from ernie45.backends.text import TextBackend, build_text
from ernie45.experts.trace import BankLog, RoutingLog
from ernie45.kernels.linear import DenseLinear, packs
from ernie45.kernels.ops import route
from ernie45.spec import ModelSpec, parse_spec
from ernie45.types.placement import Placement

CPU = torch.device("cpu")


class RandomTensors:
    """Gives every tensor it is asked for random values; remembers the names."""

    def __init__(self, *stored: str) -> None:
        self._stored = stored
        self.asked: dict[str, tuple[int, ...]] = {}
        self._generator = torch.Generator().manual_seed(0)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        for name, rows in zip(parts, out.split(list(parts.values())), strict=True):
            self.asked[name] = tuple(rows.shape)
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


EXPERTS = {
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 128,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
}


def build(source: RandomTensors, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> TextBackend:
    return build_text(spec, source, BuildOptions.unquantised(spec, dtype=dtype, device="cpu", context_tokens=64))


def allocate(shape: ModelSpec, *, num_slots: int, dtype: torch.dtype) -> KVCache:
    placement = Placement.on("cpu", shape.num_layers)
    return KVCache.allocate(
        shape, num_slots=num_slots, context_tokens=64, dtype=dtype, kv_dtype="auto", placement=placement
    )


def decode_batch(rows: dict[int, list[int]], cache: KVCache, backend: TextBackend) -> Tensor:
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


def test_it_asks_for_the_experts_of_their_layers_only() -> None:
    source = RandomTensors()
    build(source, spec(**EXPERTS))
    asked = {name: shape for name, shape in source.asked.items() if ".mlp." in name}
    experts = {
        f"model.layers.1.mlp.experts.{number}.{name}": shape
        for number in range(6)
        for name, shape in {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}.items()
    }
    assert asked == {
        "model.layers.0.mlp.gate_proj.weight": (512, 256),
        "model.layers.0.mlp.up_proj.weight": (512, 256),
        "model.layers.0.mlp.down_proj.weight": (256, 512),
        "model.layers.1.mlp.gate.weight": (6, 256),
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": (1, 6),
        "model.layers.1.mlp.shared_experts.gate_proj.weight": (128, 256),
        "model.layers.1.mlp.shared_experts.up_proj.weight": (128, 256),
        "model.layers.1.mlp.shared_experts.down_proj.weight": (256, 128),
        **{f"{name}.weight": shape for name, shape in experts.items()},
    }


@pytest.mark.parametrize(("says", "asked"), [(None, True), (True, True), (False, False)])
def test_a_correction_is_wanted_unless_the_config_says_that_there_is_none(says: bool | None, asked: bool) -> None:
    source = RandomTensors()
    build(source, spec(**EXPERTS, **({} if says is None else {"moe_use_aux_free": says})))
    assert ("model.layers.1.mlp.moe_statics.e_score_correction_bias" in source.asked) == asked


class CountingTable:
    """A table of experts that remembers which were looked up and how many rows they got."""

    def __init__(self, experts: Sequence[DenseMLP]) -> None:
        self.experts = experts
        self.looked_up: list[int] = []

    def groups(self, numbers: Sequence[int]) -> Generator[Sequence[tuple[int, DenseMLP]], None, None]:
        for number in numbers:
            self.looked_up.append(number)
            yield [(number, self.experts[number])]


def random_experts(num_experts: int, correction: Tensor | None = None) -> ExpertBank:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    experts = [
        DenseMLP(gate_up=DenseLinear(random(32, 24)), down=DenseLinear(random(24, 16))) for _ in range(num_experts)
    ]
    router = Router(weight=random(num_experts, 24), correction=correction, experts_per_token=2, norm_min=1e-12)
    log = BankLog(log=RoutingLog(num_experts), layer=1, bank="text")
    return ExpertBank(router=router, experts=CountingTable(experts), device=CPU, log=log)


def test_only_chosen_experts_are_looked_up_and_each_once() -> None:
    bank = random_experts(16)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    bank(x)
    chosen, _ = bank.router(x)
    assert bank.experts.looked_up == sorted(set(chosen.flatten().tolist()))  # type: ignore[attr-defined]


def test_experts_are_summed_by_the_shares_of_the_router() -> None:
    bank = random_experts(5)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(4))
    chosen, shares = bank.router(x)
    assert isinstance(bank.experts, CountingTable)
    experts = bank.experts.experts
    expected = torch.stack(
        [sum(share * experts[int(e)](row[None])[0] for e, share in zip(es, ss, strict=True))
         for row, es, ss in zip(x, chosen, shares, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(bank(x), expected)


class ArrivingTable:
    """Its experts come in some order, some at once."""

    def __init__(self, experts: Sequence[DenseMLP], seed: int) -> None:
        self.experts, self.draw = experts, Random(seed)

    def groups(self, numbers: Sequence[int]) -> Generator[Sequence[tuple[int, DenseMLP]], None, None]:
        waiting = self.draw.sample(numbers, len(numbers))
        while waiting:
            size = self.draw.randint(1, 3)
            yield [(number, self.experts[number]) for number in waiting[:size]]
            waiting = waiting[size:]


def test_the_order_in_which_experts_come_does_not_show() -> None:
    bank = random_experts(12)
    bank = replace(bank, router=replace(bank.router, experts_per_token=5))
    assert isinstance(bank.experts, CountingTable)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(4))
    expected = bank(x)
    for seed in range(10):
        assert torch.equal(replace(bank, experts=ArrivingTable(bank.experts.experts, seed))(x), expected)


def test_the_correction_moves_the_choice_and_not_the_shares() -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(5))
    plain, moved = random_experts(5).router, random_experts(5, torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])).router
    chosen, shares = moved(x)
    assert (chosen == 4).any(-1).all()
    assert not torch.equal(chosen, plain(x)[0])
    probabilities = (x @ plain.weight.T).softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(shares, probabilities / probabilities.sum(-1, keepdim=True))


def test_the_least_sum_keeps_tiny_probabilities_from_growing() -> None:
    correction = torch.tensor([[0.0, 2.0, 2.0]])
    weight = torch.tensor([[80.0], [0.0], [0.0]])  # exp(-80) is below the least sum
    _, shares = route(torch.ones(1, 1), weight, correction, 2, 1e-12)
    assert float(shares.sum()) < 1e-20


@pytest.mark.skipif(not packs(torch.bfloat16, CPU), reason="this CPU has no bf16 arithmetic in oneDNN")
@pytest.mark.parametrize("changes", [{}, {**EXPERTS, "moe_num_experts": 16, "moe_k": 3}], ids=["dense", "experts"])
def test_decoding_a_row_gives_the_same_bits_alone_and_among_others(changes: dict[str, object]) -> None:
    shape = spec(**changes)
    backend = build(RandomTensors(), shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    rows = {slot: torch.randint(300, (3 * slot + 2,), generator=generator).tolist() for slot in range(17)}
    cache = allocate(shape, num_slots=17, dtype=torch.bfloat16)
    together = decode_batch(rows, cache, backend)
    for slot, ids in rows.items():
        assert torch.equal(decode_batch({slot: ids}, cache, backend)[0], together[slot])


def test_what_lies_in_a_slot_from_an_earlier_request_is_never_seen() -> None:
    shape = spec()
    backend = build(RandomTensors(), shape)
    cache = allocate(shape, num_slots=1, dtype=torch.float32)
    first = decode_batch({0: [5, 6, 7]}, cache, backend)
    for store in (*cache.keys, *cache.values):
        assert isinstance(store, DenseStore)
        store.x.fill_(torch.nan)
    assert torch.equal(decode_batch({0: [5, 6, 7]}, cache, backend), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_pieces_are_those_of_one_step_and_all_in_one_place(dtype: torch.dtype) -> None:
    shape = spec()
    backend = build(RandomTensors(), shape, dtype)
    cache = allocate(shape, num_slots=1, dtype=dtype)
    batch = batch_of({0: (list(range(20)), 0)}, cache)
    whole = backend.forward(replace(batch, wanted=torch.arange(20))).logits
    places, rows = set(), []
    for piece in backend.forward(replace(batch, wanted=torch.arange(20), in_pieces=True)).pieces:
        places.add(piece.data_ptr())
        rows.append(piece.clone())
    assert len(rows) == 3
    assert len(places) == 1
    torch.testing.assert_close(torch.cat(rows), whole, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    nothing = torch.empty(0, dtype=torch.int64)
    assert not list(backend.forward(replace(batch, wanted=nothing, in_pieces=True)).pieces)
