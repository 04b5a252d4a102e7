"""Attention of the native kernels against the torch reference, and its bits however tokens are grouped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ernie45.backends.kv_cache import DenseStore, Int8Store, KVStore
from ernie45.kernels.library import instruction_set, instruction_sets, set_threads, use_instruction_set, why_not
from ernie45.kernels.native import AttentionStruct, NormStruct, batch_struct, kernels, kv_struct
from ernie45.kernels.ops import RotaryTable, attention, rotate
from ernie45.kernels.panels import dense_panels
from tests.kernels.kv_blocks import keys_from_blocks, keys_in_blocks, values_from_blocks, values_in_blocks

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native kernels: {why_not()}")

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_CONTEXT = 1408
_TABLES = {
    width: RotaryTable(head_dim=width, theta=5e5, context_tokens=_CONTEXT, device=torch.device("cpu"))
    for width in (32, 64, 96, 128)
}


@pytest.fixture(params=instruction_sets())
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = instruction_set()
    use_instruction_set(request.param)
    yield
    assert before is not None
    use_instruction_set(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Keys and values of 3 slots, as torch reads them; what nobody wrote is NaN, or codes with scales that are NaN."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @staticmethod
    def empty(kind: str, num_kv_heads: int, head_dim: int) -> Cache:
        shape, dtype = (3, num_kv_heads, _CONTEXT, head_dim), KINDS[kind]
        if dtype.is_floating_point:
            keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
            return Cache(keys=keys, values=values)
        keys, values = (torch.full(shape, 99, dtype=dtype) for _ in range(2))
        scales = (torch.full(shape[:-1], torch.nan, dtype=torch.bfloat16) for _ in range(2))
        return Cache(keys=keys, values=values, key_scales=next(scales), value_scales=next(scales))

    def stores(self) -> tuple[KVStore, KVStore]:
        if self.key_scales is None or self.value_scales is None:
            return DenseStore(x=self.keys), DenseStore(x=self.values)
        wide = torch.float32
        return (
            Int8Store(codes=self.keys, scales=self.key_scales, dtype=wide),
            Int8Store(codes=self.values, scales=self.value_scales, dtype=wide),
        )

    def tensors(self) -> list[Tensor]:
        four = (self.keys, self.values, self.key_scales, self.value_scales)
        return [tensor for tensor in four if tensor is not None]

    def write(self, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        positions = torch.arange(start, start + len(keys))
        for store, x in zip(self.stores(), (keys, values), strict=True):
            store.write(torch.full_like(positions, slot), positions, x.to(self.keys.dtype) if self.is_dense else x)

    @property
    def is_dense(self) -> bool:
        return self.key_scales is None

    def copy(self) -> Cache:
        return replace(
            self,
            keys=self.keys.clone(),
            values=self.values.clone(),
            key_scales=None if self.key_scales is None else self.key_scales.clone(),
            value_scales=None if self.value_scales is None else self.value_scales.clone(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Attention whose projections are slices of unit matrices: queries, keys and values are the hidden state."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def hidden(self, num_tokens: int) -> Tensor:
        """Random rows [T, h] whose mean square is 1 exactly, so that the norm leaves them as they are."""
        eight = torch.tensor([1.5, 1.5, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0]).repeat(self.width // 8)
        rows = torch.stack([eight[torch.randperm(self.width)] for _ in range(num_tokens)])
        return rows * (torch.randint(2, rows.shape) * 2 - 1) + 0.0  # no -0, which a sum with 0 loses

    def run(self, cache: Cache, runs: list[tuple[int, int, int]], x: Tensor) -> Tensor:
        """What attention adds to the rows of x; `runs` are (slot, first position, tokens)."""
        native = kernels()
        assert native is not None
        matrices, seen = [], self.num_heads * self.head_dim
        for out_features, in_features in ((self.width, self.width), (self.width, seen)):
            rows = torch.zeros(-(-out_features // 64) * 64, in_features, dtype=torch.bfloat16)
            rows.fill_diagonal_(1)
            matrices.append(dense_panels(rows, out_features, None))
        weight = torch.ones(self.width)
        part = AttentionStruct(
            NormStruct(weight.data_ptr(), 0.0),
            *(matrix.struct for matrix in matrices),
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        )
        positions = torch.cat([torch.arange(start, start + count) for _, start, count in runs])
        cos, sin = (table[:, 0].contiguous() for table in _TABLES[self.head_dim].at(positions))
        batch, _numbers = batch_struct(runs, cos, sin)
        keys, values, y = keys_in_blocks(cache.keys), values_in_blocks(cache.values), x.clone()
        native.attention(part, batch, kv_struct(keys, values, cache.key_scales, cache.value_scales), y)
        cache.keys.copy_(keys_from_blocks(keys))
        cache.values.copy_(values_from_blocks(values))
        return (y - x)[:, :seen]

    def reference(self, cache: Cache, slot: int, start: int, x: Tensor) -> Tensor:
        heads = x.unflatten(1, (-1, self.head_dim))
        queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        cos, sin = _TABLES[self.head_dim].at(torch.arange(start, start + len(x)))
        cache.write(slot, start, rotate(keys, cos, sin), values)
        seen = [store.read(slot, start + len(x)).float() for store in cache.stores()]
        return attention(rotate(queries, cos, sin), *seen)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "start", "num_tokens"),
    [
        (Heads(num_heads=8, num_kv_heads=1, head_dim=128), 1030, 1),
        (Heads(num_heads=10, num_kv_heads=2, head_dim=64), 255, 7),
        (Heads(num_heads=2, num_kv_heads=2, head_dim=64), 0, 40),
        (Heads(num_heads=9, num_kv_heads=1, head_dim=32), 1000, 33),
        (Heads(num_heads=6, num_kv_heads=3, head_dim=96), 511, 2),
    ],
)
def test_equals_the_reference(kind: str, heads: Heads, start: int, num_tokens: int) -> None:
    torch.manual_seed(start)
    cache = Cache.empty(kind, heads.num_kv_heads, heads.head_dim)
    cache.write(1, 0, *torch.randn(2, start, heads.num_kv_heads, heads.head_dim))
    x, expected_cache = heads.hidden(num_tokens), cache.copy()

    out = heads.run(cache, [(1, start, num_tokens)], x)

    expected = heads.reference(expected_cache, 1, start, x)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert (out - expected).square().mean() < 1e-4 * expected.square().mean()
    for written, tensor in zip(cache.tensors(), expected_cache.tensors(), strict=True):
        assert same_bits(written, tensor)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_how_tokens_are_grouped_nor_on_threads(kind: str) -> None:
    torch.manual_seed(5)
    heads = Heads(num_heads=5, num_kv_heads=1, head_dim=64)
    cache = Cache.empty(kind, 1, 64)
    cache.write(0, 0, *torch.randn(2, 1000, 1, 64))
    cache.write(2, 0, *torch.randn(2, 300, 1, 64))
    x = heads.hidden(73)
    together = heads.run(cache.copy(), [(0, 1000, 72), (2, 300, 1)], x)

    set_threads(3)
    parts, first = [], 0
    for count in (1, 5, 16, 1, 17, 32):
        parts.append(heads.run(cache, [(0, 1000 + first, count)], x[first : first + count]))
        first += count
    parts.append(heads.run(cache, [(2, 300, 1)], x[first:]))
    set_threads(torch.get_num_threads())

    assert same_bits(torch.cat(parts), together)


@pytest.mark.usefixtures("each_isa")
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_run_and_does_not_reach_earlier_tokens(kind: str) -> None:
    torch.manual_seed(6)
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=64)
    x = heads.hidden(5)
    x[1] = torch.nan
    out = heads.run(Cache.empty(kind, 2, 64), [(0, 0, 3), (1, 0, 2)], x)
    assert out[1:3].isnan().all()
    assert out[0].isfinite().all()
    assert out[3:].isfinite().all()


def test_slots_of_others_are_left_alone() -> None:
    heads = Heads(num_heads=2, num_kv_heads=1, head_dim=32)
    cache = Cache.empty("bfloat16", 1, 32)
    heads.run(cache, [(1, 7, 1)], heads.hidden(1))
    written = cache.keys.isfinite().all(dim=-1)
    assert written.sum() == 1
    assert written[1, 0, 7]
