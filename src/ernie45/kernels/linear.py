"""Weight matrices: y = x Wᵀ + b, in whatever form W is kept."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN's bf16 product on a CPU runs 1 row slower than 4 (17 against 22 GB/s of weights), and without packing sums 1
# row in another order than many. Rows beyond the real ones are zeros and are cut off again.
_MIN_CPU_ROWS = 4


class Linear(Protocol):
    """A weight matrix [out, in] with its product."""

    @property
    def out_features(self) -> int: ...

    @property
    def code_bytes(self) -> int:
        """Bytes of the matrix and the bias, without scales."""
        ...

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a quantised matrix."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out]"""
        ...


class Embedding(Protocol):
    """A table [V, h] that is looked up by row."""

    def lookup(self, ids: Tensor) -> Tensor:
        """ids int64 [N] -> [N, h]"""
        ...


class DenseLinear:
    """A matrix in a floating dtype. On a CPU in bf16 it is kept in oneDNN's blocked layout, which is read about a third
    faster and gives a row the same bits whatever stands beside it."""

    __slots__ = ("bias", "in_features", "out_features", "packed", "pads_rows", "weight")

    scale_bytes = 0

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.pads_rows = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        self.packed = pack and packs(weight.dtype, weight.device)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight

    @property
    def code_bytes(self) -> int:
        # A packed weight has no storage that torch could measure; oneDNN pads it by nothing at multiples of 64.
        return self.out_features * self.in_features * self.weight.dtype.itemsize + bias_bytes(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if self.pads_rows and num_rows < _MIN_CPU_ROWS:
            return self._product(F.pad(x, (0, 0, 0, _MIN_CPU_ROWS - num_rows)))[:num_rows]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class DenseEmbedding:
    """A table in a floating dtype."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def lookup(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a DenseLinear keeps a packed copy of such a weight, so that the one it is given can be let go or
    reused."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bias_bytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel() * bias.element_size()
