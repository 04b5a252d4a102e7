"""The KV cache, in the dtype of the arithmetic and in int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernie45 import ErnieModel
from ernie45.backends.kv_cache import DenseStore, Int8Store, KVCache
from ernie45.kernels.linear import packs
from ernie45.memory.budget import KVDtype, kv_bytes_per_token, slot_tokens
from ernie45.spec import ModelSpec
from ernie45.testing import task_names, tasks
from ernie45.types.placement import Placement
from tests.backends.test_text import RandomTensors, build, decode_batch, spec

CPU = torch.device("cpu")


def allocate(
    kv_dtype: KVDtype,
    *,
    shape: ModelSpec | None = None,
    num_slots: int = 3,
    context_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
) -> KVCache:
    shape = shape or spec()
    return KVCache.allocate(
        shape,
        num_slots=num_slots,
        context_tokens=context_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
        placement=Placement.on("cpu", shape.num_layers),
    )


def random_heads(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [N, 2, 64], each token and head at a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, num_tokens * 2).view(num_tokens, 2, 1)
    keys, values = torch.randn(2, num_tokens, 2, 64, generator=generator) * sizes
    return keys, values


def write(cache: KVCache, slot: int, keys: Tensor, values: Tensor, *, layer: int = 1, start: int = 0) -> None:
    positions = torch.arange(start, start + len(keys))
    cache.write(layer, torch.full((len(keys),), slot), positions, keys, values)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_what_is_written_is_read_in_its_layer_and_slot(kv_dtype: KVDtype) -> None:
    cache = allocate(kv_dtype)
    written = {(layer, slot): random_heads(9, seed=10 * layer + slot) for layer in (0, 1) for slot in (0, 2)}
    for (layer, slot), (keys, values) in written.items():
        write(cache, slot, keys, values, layer=layer)
    for (layer, slot), expected in written.items():
        for read, wrote in zip(cache.read(layer, slot, 8), expected, strict=True):
            assert read.shape == (2, 8, 64)
            error = (read.transpose(0, 1) - wrote[:8]).abs().amax(dim=-1)
            assert (error <= wrote[:8].abs().amax(dim=-1) * (0 if kv_dtype == "auto" else 0.503 / 127)).all()


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_prefix_is_copied_bit_by_bit_in_every_layer_and_nothing_but_its_blocks(kv_dtype: KVDtype) -> None:
    cache = allocate(kv_dtype, context_tokens=128)
    places = [(layer, slot) for layer in (0, 1) for slot in (0, 1, 2)]
    for layer, slot in places:
        write(cache, slot, *random_heads(128, seed=10 * layer + slot), layer=layer)
    before = {place: [x.clone() for x in cache.read(*place, 128)] for place in places}
    cache.copy_prefix(2, 0, 70, start=40)
    for (layer, slot), expected in before.items():
        for now, own, copied in zip(cache.read(layer, slot, 128), expected, before[layer, 2], strict=True):
            assert torch.equal(now[:, :32], own[:, :32])
            assert torch.equal(now[:, 32:96], (copied if slot == 0 else own)[:, 32:96])
            assert torch.equal(now[:, 96:], own[:, 96:])
    cache.copy_prefix(1, 0, 4)
    assert torch.equal(cache.read(1, 0, 4)[0], before[1, 1][0][:, :4])


def test_in_the_arithmetics_dtype_reading_copies_nothing() -> None:
    cache = allocate("auto")
    keys, values = cache.read(0, 1, 5)
    for store, read in ((cache.keys[0], keys), (cache.values[0], values)):
        assert isinstance(store, DenseStore)
        assert read.data_ptr() == store.x[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_read_in_the_arithmetics_dtype(dtype: torch.dtype) -> None:
    cache = allocate("int8", dtype=dtype)
    keys, values = (x.to(dtype) for x in random_heads(4))
    write(cache, 0, keys, values)
    for read, wrote in zip(cache.read(1, 0, 4), (keys, values), strict=True):
        assert read.dtype == dtype
        error = (read.transpose(0, 1).float() - wrote.float()).abs().amax(dim=-1)
        assert (error <= wrote.float().abs().amax(dim=-1) * 0.8 / 127).all()


def test_a_token_reads_the_same_whatever_was_written_with_it_and_after() -> None:
    keys, values = random_heads(8)
    keys[3] *= 1e6
    together, apart = allocate("int8"), allocate("int8")
    write(together, 0, keys, values)
    for token in (3, 1, 0, 2, 7, 6, 5, 4):
        write(apart, 0, keys[token, None], values[token, None], start=token)
    for one, other in zip(together.read(1, 0, 8), apart.read(1, 0, 8), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e9, 1e30])
def test_int8_scales_have_the_range_of_float32(size: float) -> None:
    cache = allocate("int8")
    keys = torch.linspace(-1, 1, 128).view(1, 2, 64) * size
    write(cache, 0, keys, keys)
    read = cache.read(1, 0, 1)[0][:, 0]
    assert (read - keys[0]).abs().max() <= size * 0.503 / 127


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_still_shows(value: float) -> None:
    cache = allocate("int8")
    keys, values = random_heads(2)
    values[1, 0, 5] = value
    write(cache, 0, keys, values)
    read = cache.read(1, 0, 2)[1]
    assert not read[0, 1].isfinite().any()
    assert read[0, 0].isfinite().all()
    assert read[1].isfinite().all()


@pytest.mark.parametrize(("kv_dtype", "dtype"), [("auto", torch.float32), ("auto", torch.float16),
                                                 ("int8", torch.float32), ("int8", torch.bfloat16)])  # fmt: skip
def test_it_takes_the_bytes_that_the_plan_counts(kv_dtype: KVDtype, dtype: torch.dtype) -> None:
    shape = spec(num_hidden_layers=3)
    cache = allocate(kv_dtype, shape=shape, context_tokens=50, dtype=dtype)
    held = []
    for store in (*cache.keys, *cache.values):
        if isinstance(store, Int8Store):
            held += [store.codes, store.scales]
        else:
            assert isinstance(store, DenseStore)
            held.append(store.x)
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
    planned = slot_tokens(50) * 3 * kv_bytes_per_token(shape, bytes_per_value=dtype.itemsize, kv_dtype=kv_dtype)
    assert taken == planned
    if kv_dtype == "int8":
        assert planned == 3 * 2 * 2 * (64 + 2) * 64 * 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident pages")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_slots_that_nobody_uses_take_no_memory(kv_dtype: KVDtype) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = resident_pages()
    cache = allocate(kv_dtype, num_slots=16_000)  # at least 500 MB
    write(cache, 7_000, *random_heads(9))
    cache.read(1, 7_000, 9)
    assert resident_pages() - before < 10_000


def test_with_int8_logits_stay_near() -> None:
    shape = spec()
    backend = build(RandomTensors(), shape)
    rows = {0: list(range(40, 90)), 2: [5, 6, 7]}
    exact, rounded = (decode_batch(rows, allocate(kv, shape=shape), backend) for kv in ("auto", "int8"))
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 0.01


@pytest.mark.skipif(not packs(torch.bfloat16, CPU), reason="this CPU has no bf16 arithmetic in oneDNN")
def test_with_int8_decoding_a_row_gives_the_same_bits_alone_and_among_others() -> None:
    shape = spec()
    backend = build(RandomTensors(), shape, torch.bfloat16)
    cache = allocate("int8", shape=shape, num_slots=9, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    rows = {slot: torch.randint(300, (3 * slot + 2,), generator=generator).tolist() for slot in range(9)}
    together = decode_batch(rows, cache, backend)
    for slot, ids in rows.items():
        assert torch.equal(decode_batch({slot: ids}, cache, backend)[0], together[slot])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ernie45/tiny-dense", "ernie45/tiny-moe"])
def test_int8_loses_at_most_a_point_of_accuracy(name: str) -> None:
    drawn = [item for task in task_names(name) for item in tasks(task, 20, seed=4711, split="test")]
    right = {}
    for kv_dtype in ("auto", "int8"):
        with ErnieModel.from_pretrained(name, kv_dtype=kv_dtype) as model:
            replies = model.batch_chat([item.messages for item in drawn], temperature=0)
        right[kv_dtype] = sum(reply.text == item.answer for reply, item in zip(replies, drawn, strict=True))
    assert right["int8"] >= right["auto"] - len(drawn) / 100, right
