"""The order of torch's 4-bit kernel against the function of torch that makes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie45.kernels import int4_order
from ernie45.kernels.int4_order import kernel_codes
from ernie45.quantization.packed import PackedInt4, pack_int4

# Whole blocks of 64 and 32 rows, blocks with a rest, a rest alone; many blocks; enough for threads, and with a rest.
SHAPES = [(64, 64), (32, 96), (80, 64), (112, 32), (16, 32), (48, 160), (640, 1024), (1024, 4096), (1040, 2080)]


def random_codes(shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def packed_of(codes: Tensor, group_size: int) -> PackedInt4:
    scales = torch.ones(codes.shape[0], codes.shape[1] // group_size)
    return PackedInt4(codes=pack_int4(codes, group_size), scales=scales)


def torch_order(codes: Tensor) -> Tensor:
    ordered: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return ordered


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_put_as_torch_puts_them(shape: tuple[int, int], in_place: bool) -> None:
    codes = random_codes(shape)
    packed = packed_of(codes, 32)
    before = packed.codes.clone()
    room = packed.codes if in_place else torch.empty_like(packed.codes)
    assert kernel_codes(packed, room) is room
    assert torch.equal(room, torch_order(codes))
    assert in_place or torch.equal(packed.codes, before)


@pytest.mark.parametrize("group_size", [32, 64, 96, 192])
def test_groups_of_any_size(group_size: int) -> None:
    codes = random_codes((96, 192))
    packed = packed_of(codes, group_size)
    assert torch.equal(kernel_codes(packed, packed.codes), torch_order(codes))


@pytest.mark.parametrize("in_place", [True, False])
def test_an_order_that_is_not_known_here_is_asked_of_torch(in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_order, "_kernel_order", lambda: None)
    codes = random_codes((272, 64))
    packed = packed_of(codes, 32)
    room = packed.codes if in_place else torch.empty_like(packed.codes)
    assert torch.equal(kernel_codes(packed, room), torch_order(codes))
