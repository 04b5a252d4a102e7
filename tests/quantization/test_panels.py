"""4-bit matrices in panels: the order of their bytes, written out, and the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernie45.quantization.packed import PackedInt4
from ernie45.quantization.panels import empty_panels, in_panels, in_rows, pad_rows, panel_shape

SIZES = [(num_rows, num_groups) for num_rows in (1, 63, 64, 65, 130) for num_groups in (1, 2, 3, 4, 5, 8, 9)]


def random_int4(num_rows: int, num_groups: int) -> PackedInt4:
    """In groups of 32."""
    draw = torch.Generator().manual_seed(num_rows + num_groups)
    return PackedInt4(
        codes=torch.randint(0, 256, (num_rows, 16 * num_groups), dtype=torch.uint8, generator=draw),
        scales=torch.randint(-127, 128, (num_rows, num_groups), dtype=torch.int8, generator=draw),
        row_scales=torch.rand(num_rows, generator=draw) + 0.5,
    )


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_the_order_of_bytes(num_rows: int, num_groups: int) -> None:
    """For 64 rows and four groups a dword of scales of each row, then dword after dword of codes of each."""
    packed = random_int4(num_rows, num_groups)
    num_panels, num_runs = -(-num_rows // 64), -(-num_groups // 4)
    scales = np.zeros((64 * num_panels, 4 * num_runs), dtype=np.int8)
    scales[:num_rows, :num_groups] = packed.scales
    codes = np.zeros((64 * num_panels, 16 * num_groups), dtype=np.uint8)
    codes[:num_rows] = packed.codes
    scale_dwords, code_dwords = scales.view(np.uint32), codes.view(np.uint32)
    expected = [
        dwords
        for first in range(0, 64 * num_panels, 64)
        for run in range(num_runs)
        for dwords in (
            scale_dwords[first : first + 64, run],
            code_dwords[first : first + 64, 16 * run : 16 * run + 16].T.flatten(),
        )
    ]
    found = in_panels(packed)
    assert found.panels.shape == panel_shape(num_rows, 32 * num_groups)
    assert found.panels.numpy().tobytes() == np.concatenate(expected).tobytes()
    assert packed.row_scales is not None
    assert torch.equal(found.row_scales[:num_rows], packed.row_scales)
    assert found.row_scales[num_rows:].tolist() == [0] * (64 * num_panels - num_rows)


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_rows_come_back_as_they_were(num_rows: int, num_groups: int) -> None:
    packed = random_int4(num_rows, num_groups)
    back = in_rows(in_panels(packed))
    assert back.tensors().keys() == packed.tensors().keys()
    for leaf, tensor in packed.tensors().items():
        found = back.tensors()[leaf]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert found.is_contiguous()


@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (1, 4), (64, 1), (64, 4), (65, 5)])
def test_rows_share_no_memory_with_panels(num_rows: int, num_groups: int) -> None:
    panels = in_panels(random_int4(num_rows, num_groups))
    rows = in_rows(panels)
    before = {leaf: tensor.clone() for leaf, tensor in rows.tensors().items()}
    for tensor in panels.tensors().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[leaf]) for leaf, tensor in rows.tensors().items())


@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (130, 5)])
def test_shapes_without_values(num_rows: int, num_groups: int) -> None:
    shaped = PackedInt4(
        **{leaf: tensor.to("meta") for leaf, tensor in random_int4(num_rows, num_groups).tensors().items()}
    )
    panels, rows = in_panels(shaped), in_rows(in_panels(shaped))
    room = empty_panels(num_rows, 32 * num_groups, torch.device("meta"))
    assert (panels.out_features, panels.in_features) == (room.out_features, room.in_features)
    for found, expected in ((panels, room), (rows, shaped)):
        assert found.tensors().keys() == expected.tensors().keys()
        for leaf, tensor in found.tensors().items():
            other = expected.tensors()[leaf]
            assert (tensor.device.type, tensor.shape, tensor.dtype) == ("meta", other.shape, other.dtype)


def test_rows_that_fill_panels_are_not_copied() -> None:
    x = torch.ones(128, 3)
    assert pad_rows(x).data_ptr() == x.data_ptr()
    padded = pad_rows(x[:65])
    assert padded.shape == (128, 3)
    assert bool((padded[:65] == 1).all())
    assert bool((padded[65:] == 0).all())
