"""MLPs, experts and routing of the native kernels on each instruction set, against the same in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from threading import Thread

import pytest
import torch
from torch import Tensor

from ernie45.kernels.library import set_threads, work_alone
from ernie45.kernels.native import Kernels, trim
from ernie45.kernels.ops import route
from ernie45.quantization.panels import in_panels, panel_shape
from tests.kernels.panel_matrices import DTYPES, SCHEMES, Bank, Mlp, Norm, Router, choice, random
from tests.quantization.test_panels import random_int4

NO_CHOICE = torch.empty((0, 2), dtype=torch.int64), torch.empty((0, 2))


def assert_added(x: Tensor, before: Tensor, added: Tensor) -> None:
    """That `added` was added to `before`: within the roundings of x and a few of what is multiplied on the way."""
    expected = before.double() + added
    steps = 2.0**-8 if x.dtype == torch.bfloat16 else 1e-6
    wrong = ((x.double() - expected).abs() - steps * expected.abs()).clamp(min=0)
    assert wrong.max() <= 5e-3 * added.abs().max()
    assert wrong.norm() < 1e-3 * added.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "width", "num_tokens", "bias"),
    [(32, 64, 1, True), (96, 192, 5, False), (160, 64, 17, True), (256, 512, 97, True), (1056, 128, 2, False)],
)
@pytest.mark.parametrize("schemes", list(itertools.product(SCHEMES, SCHEMES)))
def test_a_dense_mlp(
    each_set: Kernels,
    schemes: tuple[str, str],
    hidden: int,
    width: int,
    num_tokens: int,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    mlp, norm = Mlp.draw(schemes, hidden, width, bias=bias), Norm(hidden)
    before = (random(num_tokens, hidden, seed=9) * 2).to(dtype)
    x = before.clone()
    each_set.mlp(norm.struct, mlp.struct, x)
    assert_added(x, before, mlp(norm(before)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", ["", "none", "int8"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "num_tokens", "bias"),
    [(1, 1, 3, False), (4, 1, 2, True), (9, 8, 20, False), (6, 6, 7, True), (64, 6, 1, False), (5, 2, 100, False)],
)
def test_experts(
    each_set: Kernels,
    num_experts: int,
    num_chosen: int,
    num_tokens: int,
    bias: bool,
    scheme: str,
    shared: str,
    dtype: torch.dtype,
) -> None:
    hidden, norm = 96, Norm(96)
    chosen, shares = choice(num_tokens, num_experts, num_chosen)
    experts = [Mlp.draw((scheme, scheme), hidden, 64, bias=bias, seed=10 * i) for i in range(num_experts)]
    bank = Bank(experts, chosen.flatten().tolist())
    beside = Mlp.draw((shared, shared), hidden, 128, bias=bias, seed=999) if shared else None
    before = (random(num_tokens, hidden, seed=9) * 2).to(dtype)
    x = before.clone()
    each_set.experts(norm.struct, bank.table, None if beside is None else beside.struct, chosen, shares, x)
    added = bank(norm(before), chosen, shares)
    assert_added(x, before, added if beside is None else added + beside(norm(before)))


def parts(chosen: Tensor, *, shared: bool, seed: int) -> list[tuple[bool, list[int]]]:
    """The chosen experts and the shared MLP in some order, several calls: whether each has the shared MLP, and its
    experts."""
    draw, number_of_shared = Random(seed), -1
    members = sorted(set(chosen.flatten().tolist())) + ([number_of_shared] if shared else [])
    draw.shuffle(members)
    ends = sorted(draw.sample(range(1, len(members)), draw.randint(0, len(members) - 1)))
    groups = [members[start:end] for start, end in itertools.pairwise([0, *ends, len(members)])]
    return [(number_of_shared in group, [n for n in group if n != number_of_shared]) for group in groups]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("hidden", "num_experts", "num_chosen", "num_tokens", "bias"),
    [(32, 1, 1, 3, False), (96, 9, 3, 1, True), (160, 12, 4, 7, False), (96, 16, 2, 100, True)],
)
def test_experts_in_several_calls_are_the_bits_of_one(
    each_set: Kernels,
    hidden: int,
    num_experts: int,
    num_chosen: int,
    num_tokens: int,
    bias: bool,
    scheme: str,
    shared: bool,
    dtype: torch.dtype,
) -> None:
    norm, (chosen, shares) = Norm(hidden), choice(num_tokens, num_experts, num_chosen)
    experts = [Mlp.draw((scheme, scheme), hidden, 64, bias=bias, seed=10 * i) for i in range(num_experts)]
    bank, shared_mlp = Bank(experts), Mlp.draw((scheme, scheme), hidden, 128, bias=bias, seed=999)
    before = (random(num_tokens, hidden, seed=9) * 2).to(dtype)
    expected = before.clone()
    each_set.experts(norm.struct, bank.table, shared_mlp.struct if shared else None, chosen, shares, expected)
    for seed in range(4):
        x, outputs = before.clone(), torch.full((num_tokens * (num_chosen + shared), hidden), torch.nan)
        for has_shared, numbers in parts(chosen, shared=shared, seed=seed):
            # What is not there yet, or no more, is not looked at.
            there, beside = Bank(experts, numbers), shared_mlp.struct if has_shared else None
            each_set.experts(norm.struct, there.table, beside, chosen, shares, x, numbers, outputs)
            assert torch.equal(x, before)
        each_set.add_outputs(outputs, has_shared=shared, chosen=chosen, shares=shares, x=x)
        assert torch.equal(x, expected)


def test_an_expert_that_nobody_chose_is_not_looked_at(each_set: Kernels) -> None:
    experts, norm = [Mlp.draw(("int4", "int4"), 64, 64, seed=i) for i in range(3)], Norm(64)
    chosen, shares = torch.tensor([[2], [0], [2]]), torch.rand(3, 1)
    there, x, outputs = Bank(experts, [2]), random(3, 64, seed=9), torch.full((3, 64), 7.0)
    each_set.experts(norm.struct, there.table, None, chosen, shares, x, [1, 2], outputs)
    expected = experts[2](norm(x[[0, 2]]))
    assert (outputs[[0, 2]] - expected).norm() < 1e-3 * expected.norm()
    assert bool((outputs[1] == 7).all())


@pytest.fixture
def one_thread(each_set: Kernels) -> Iterator[Kernels]:
    """So that tasks are few and each has several panels, as in matrices that are wider than a test's."""
    set_threads(1)
    yield each_set
    set_threads(torch.get_num_threads())


@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_panels_a_task(one_thread: Kernels, scheme: str, num_tokens: int) -> None:
    mlp, norm = Mlp.draw((scheme, scheme), 1056, 1088, bias=True), Norm(1056)
    before = random(num_tokens, 1056, seed=9)
    x = before.clone()
    one_thread.mlp(norm.struct, mlp.struct, x)
    assert_added(x, before, mlp(norm(before)))


@pytest.mark.parametrize("num_tokens", [2, 60])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_several_panels_of_an_expert_a_task(one_thread: Kernels, scheme: str, num_tokens: int) -> None:
    bank, norm = Bank([Mlp.draw((scheme, scheme), 544, 320, seed=i) for i in range(5)]), Norm(544)
    beside = Mlp.draw((scheme, scheme), 544, 576, seed=99)
    chosen, shares = choice(num_tokens, 5, 3)
    before = random(num_tokens, 544, seed=9)
    x = before.clone()
    one_thread.experts(norm.struct, bank.table, beside.struct, chosen, shares, x)
    assert_added(x, before, bank(norm(before), chosen, shares) + beside(norm(before)))


def test_experts_of_every_scheme_at_once(each_set: Kernels) -> None:
    pairs = [("int4", "int4"), ("none", "int8"), ("int8", "int4"), ("int4", "none")]
    bank = Bank([Mlp.draw(pair, 128, 64, seed=7 * i) for i, pair in enumerate(pairs)])
    beside, norm = Mlp.draw(("int8", "none"), 128, 192, seed=99), Norm(128)
    chosen, shares = choice(40, 4, 3)
    before = random(40, 128, seed=9)
    x = before.clone()
    each_set.experts(norm.struct, bank.table, beside.struct, chosen, shares, x)
    assert_added(x, before, bank(norm(before), chosen, shares) + beside(norm(before)))


@pytest.mark.parametrize("number", [0, 3])
def test_one_expert_for_every_token(each_set: Kernels, number: int) -> None:
    bank, norm = Bank([Mlp.draw(("int4", "int4"), 64, 64, seed=i) for i in range(4)], [number]), Norm(64)
    chosen, shares = torch.full((99, 1), number), torch.rand(99, 1)
    before = random(99, 64, seed=9)
    x = before.clone()
    each_set.experts(norm.struct, bank.table, None, chosen, shares, x)
    assert_added(x, before, bank(norm(before), chosen, shares))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens(native: Kernels, scheme: str) -> None:
    bank, norm, router = Bank([Mlp.draw((scheme, scheme), 64, 64)] * 3), Norm(64), Router(3, 64, 2)
    for dtype in DTYPES:
        x = torch.empty((0, 64), dtype=dtype)
        trim()  # there is no workspace then
        native.mlp(norm.struct, bank.experts[0].struct, x)
        native.experts(norm.struct, bank.table, None, *NO_CHOICE, x)
        chosen, shares = native.route(norm.struct, router.struct, x)
        assert chosen.shape == shares.shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hidden_states_of_every_size(each_set: Kernels, scheme: str, dtype: torch.dtype) -> None:
    mlp, norm = Mlp.draw((scheme, scheme), 96, 128, bias=True), Norm(96)
    before = random(6, 96, seed=9)
    before[1] *= 1e15
    before[2] *= 1e-20
    before[3] = 0
    before[4, 5] = 1e6
    before = before.to(dtype)
    x = before.clone()
    each_set.mlp(norm.struct, mlp.struct, x)
    assert_added(x, before, mlp(norm(before)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gates_far_from_zero(each_set: Kernels, scheme: str, dtype: torch.dtype) -> None:
    """exp of what no float32 can hold."""
    mlp, norm = Mlp.draw((scheme, scheme), 64, 64, bias=True), Norm(64)
    assert mlp.gate_up.bias is not None
    mlp.gate_up.bias[:64] = torch.tensor([1000.0, -1000.0, 87.5, -88.5, -1e30, 0.0, 60.0, -60.0]).repeat(8)
    before = random(3, 64, seed=9).to(dtype)
    x = before.clone()
    each_set.mlp(norm.struct, mlp.struct, x)
    assert_added(x, before, mlp(norm(before)))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_not_finite_shows_in_its_row_only(each_set: Kernels, scheme: str, wrong: float) -> None:
    bank, norm = Bank([Mlp.draw((scheme, scheme), 64, 64, seed=i) for i in range(4)]), Norm(64)
    router, others = Router(4, 64, 2), torch.arange(9) != 4
    rows = random(9, 64, seed=9).bfloat16()
    damaged = rows.clone()
    damaged[4, 37] = wrong
    found = []
    for x in (rows, damaged):
        chosen, shares = each_set.route(norm.struct, router.struct, x)
        assert chosen.min() >= 0
        assert chosen.max() < 4
        x = x.clone()
        each_set.experts(norm.struct, bank.table, bank.experts[0].struct, chosen, shares, x)
        found.append((chosen, shares, x))
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean[others], beside[others])
    assert bool(found[1][1][4].isnan().all())
    assert not bool(found[1][2][4].isfinite().any())


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_begin_anywhere_and_nothing_beside_them_is_written(
    each_set: Kernels, dtype: torch.dtype, offset: int
) -> None:
    mlp, norm = Mlp.draw(("int8", "int4"), 96, 64), Norm(96)
    x = random(7, 96, seed=9).to(dtype)
    room = torch.full((offset + x.numel() + 5,), 3.0, dtype=dtype)
    moved = room[offset : offset + x.numel()].view(x.shape)
    moved.copy_(x)
    for rows in (x, moved):
        each_set.mlp(norm.struct, mlp.struct, rows)
    assert torch.equal(moved, x)
    assert bool((room[:offset] == 3).all())
    assert bool((room[-5:] == 3).all())


@pytest.mark.parametrize("norm_min", [1e-12, 0.6])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "width", "num_chosen"), [(1, 32, 1), (7, 96, 3), (8, 256, 8), (64, 1056, 6), (160, 64, 1)]
)
def test_routes(
    each_set: Kernels, num_experts: int, width: int, num_chosen: int, correction: bool, norm_min: float
) -> None:
    router = Router(num_experts, width, num_chosen, correction=correction, norm_min=norm_min)
    norm = Norm(width)
    x = random(33, width, seed=9) * 4
    chosen, shares = each_set.route(norm.struct, router.struct, x)
    expected = route(norm(x), router.weight, router.correction, num_chosen, norm_min)
    assert torch.equal(chosen, expected[0])
    torch.testing.assert_close(shares, expected[1], atol=1e-6, rtol=1e-4)


def test_routes_of_bfloat16(each_set: Kernels) -> None:
    router, norm = Router(64, 256, 6, correction=True), Norm(256)
    # Of a mean square of 1, so that the norm does not round: a near-tie could go either way.
    x = (random(50, 256, seed=9).sign()).bfloat16()
    norm.struct.eps = 0
    chosen, shares = each_set.route(norm.struct, router.struct, x)
    expected = route(x * norm.weight.bfloat16(), router.weight, router.correction, 6, 1e-12)
    assert torch.equal(chosen, expected[0])
    torch.testing.assert_close(shares, expected[1], atol=1e-6, rtol=1e-4)


def test_of_equal_experts_the_first_are_chosen(each_set: Kernels) -> None:
    router, norm = Router(9, 64, 4), Norm(64)
    router.weight.zero_()
    chosen, shares = each_set.route(norm.struct, router.struct, random(5, 64))
    assert chosen.tolist() == [[0, 1, 2, 3]] * 5
    assert torch.equal(shares, torch.full((5, 4), 0.25))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 130])
def test_int4_panels_are_those_of_files(native: Kernels, num_rows: int, num_groups: int, alone: bool) -> None:
    packed = random_int4(num_rows, num_groups)
    panels = torch.full(panel_shape(num_rows, 32 * num_groups), 0xAA, dtype=torch.uint8)

    def make() -> None:
        if alone:
            work_alone()
        native.make_int4_panels(packed.codes, packed.scales, panels)

    thread = Thread(target=make)
    thread.start()
    thread.join()
    assert torch.equal(panels, in_panels(packed).panels)
