"""4-bit matrices in panels of 64 rows: how files hold them, and the native kernels multiply with them.

The order is that of csrc/ernie45.h, and part of the format in docs/packed-format.md. Shape letters: N rows (outputs), K
columns (inputs), G = K / 32 groups of a row, P = N / 64 panels, rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.presets import INT4_GROUP
from ernie45.quantization.packed import Packed, PackedInt4

PANEL_ROWS = 64

_GROUPS_A_RUN = 4  # whose scales are a dword, which lies before their codes
_GROUP_DWORDS = INT4_GROUP // 8
_RUN_DWORDS = 1 + _GROUPS_A_RUN * _GROUP_DWORDS
_RUN_CODES = _GROUPS_A_RUN * INT4_GROUP // 2  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelInt4:
    """A `PackedInt4` of groups of 32, without zeros or an order of inputs.

    `panels` uint8 [P, D, 64, 4] has a dword of each of a panel's 64 rows side by side, then the next: the scales of
    four groups, a byte each, and the codes of these, until the row ends; D = 4 · G + G / 4, rounded up. `row_scales`
    are float32 [64 · P]. Rows beyond `out_features`, N, are zeros.
    """

    panels: Tensor
    row_scales: Tensor
    out_features: int
    in_features: int

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the name each has in files."""
        return {"panels": self.panels, "row_scales": self.row_scales}


StoredMatrix = Packed | PanelInt4
"""A quantised matrix as files hold it."""


def panel_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Of `PanelInt4.panels`; K is a multiple of 32."""
    groups = in_features // INT4_GROUP
    dwords = groups * _GROUP_DWORDS + -(-groups // _GROUPS_A_RUN)
    return -(-out_features // PANEL_ROWS), dwords, PANEL_ROWS, 4


def empty_panels(out_features: int, in_features: int, device: torch.device) -> PanelInt4:
    """Room for one."""
    shape = panel_shape(out_features, in_features)
    return PanelInt4(
        panels=torch.empty(shape, dtype=torch.uint8, device=device),
        row_scales=torch.empty(shape[0] * PANEL_ROWS, dtype=torch.float32, device=device),
        out_features=out_features,
        in_features=in_features,
    )


def in_panels(packed: PackedInt4) -> PanelInt4:
    """The same matrix, in panels."""
    assert packed.row_scales is not None
    num_rows, num_groups = packed.scales.shape
    num_panels, num_dwords, _, _ = panel_shape(num_rows, packed.in_features)
    num_runs = -(-num_groups // _GROUPS_A_RUN)
    runs = packed.codes.new_zeros((num_panels, PANEL_ROWS, num_runs, _RUN_DWORDS * 4))
    scales = F.pad(pad_rows(packed.scales), (0, num_runs * _GROUPS_A_RUN - num_groups))
    runs[..., :4] = scales.view(torch.uint8).view(num_panels, PANEL_ROWS, num_runs, 4)
    codes = F.pad(pad_rows(packed.codes), (0, num_runs * _RUN_CODES - packed.codes.shape[1]))
    runs[..., 4:] = codes.view(num_panels, PANEL_ROWS, num_runs, _RUN_CODES)
    dwords = runs.view(num_panels, PANEL_ROWS, num_runs * _RUN_DWORDS, 4)[:, :, :num_dwords]
    return PanelInt4(
        panels=dwords.transpose(1, 2).contiguous(),
        row_scales=pad_rows(packed.row_scales),
        out_features=num_rows,
        in_features=packed.in_features,
    )


def in_rows(matrix: PanelInt4) -> PackedInt4:
    """The same matrix, row by row."""
    num_panels, num_dwords, _, _ = matrix.panels.shape
    num_rows, num_groups = matrix.out_features, matrix.in_features // INT4_GROUP
    num_runs = -(-num_groups // _GROUPS_A_RUN)
    dwords = F.pad(matrix.panels.transpose(1, 2), (0, 0, 0, num_runs * _RUN_DWORDS - num_dwords))
    runs = dwords.reshape(num_panels * PANEL_ROWS, num_runs, _RUN_DWORDS * 4)[:num_rows]
    return PackedInt4(
        codes=runs[..., 4:].flatten(1)[:, : matrix.in_features // 2].contiguous(),
        scales=runs[..., :4].flatten(1)[:, :num_groups].contiguous().view(torch.int8),
        row_scales=matrix.row_scales[:num_rows].clone(),
    )


def pad_rows(x: Tensor) -> Tensor:
    """x [N, …] with rows of zeros up to a whole panel; x itself where there are none to add."""
    missing = -len(x) % PANEL_ROWS
    return torch.cat((x, x.new_zeros((missing, *x.shape[1:])))) if missing else x.contiguous()
