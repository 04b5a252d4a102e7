"""Random matrices in panels with what their codes stand for, and in float64 what the kernels do with them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.kernels.native import MlpStruct, NormStruct, RouterStruct
from ernie45.kernels.ops import rms_norm
from ernie45.kernels.panels import PanelLinear, PanelMemory, dense_panels, packed_panels, room_for_panels
from ernie45.quantization.packed import PackedInt8, dequantize, empty_packed
from ernie45.quantization.quantize import quantize_into

SCHEMES = ("none", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5
_MEMORY = PanelMemory()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """`weights` [N, K] are in float64; `packed` is there for int8."""

    scheme: str
    linear: PanelLinear
    weights: Tensor
    bias: Tensor | None
    packed: PackedInt8 | None = None

    @staticmethod
    def draw(scheme: str, out_features: int, in_features: int, *, bias: bool = False, seed: int = 0) -> Matrix:
        values = random(out_features, in_features, seed=seed) / in_features**0.5
        drawn = random(out_features, seed=seed + 1) if bias else None
        if scheme == "none":
            # Nothing may come of the rows that fill the last panel.
            rows = room_for_panels(_MEMORY, out_features, in_features).fill_(torch.nan)
            rows[:out_features] = values
            weights = rows[:out_features].double()
            return Matrix(scheme=scheme, linear=dense_panels(rows, out_features, drawn), weights=weights, bias=drawn)
        packed = empty_packed(scheme, out_features, in_features, 32, torch.device("cpu"))
        quantize_into(packed, values)
        linear = packed_panels(packed, drawn, _MEMORY)
        assert linear is not None
        return Matrix(
            scheme=scheme,
            linear=linear,
            weights=dequantize(packed).double(),
            bias=drawn,
            packed=packed if isinstance(packed, PackedInt8) else None,
        )

    def product(self, x: Tensor) -> Tensor:
        """x [N, K], rounded as for the kernel -> [N, out] in float64."""
        y = rounded(x, self.scheme) @ self.weights.T
        return y if self.bias is None else y + self.bias.double()

    def size(self, x: Tensor) -> Tensor:
        """Of what the product sums: how far off its last bits may be is in proportion to it."""
        y = rounded(x, self.scheme).abs() @ self.weights.abs().T
        return y if self.bias is None else y + self.bias.double().abs()


def rounded(x: Tensor, scheme: str) -> Tensor:
    """What is multiplied: bfloat16; int8 by a scale for each row; or for each group of 32."""
    if scheme == "none":
        return x.bfloat16().double()
    groups = x.float().view(len(x), x.shape[1] // 32, 32) if scheme == "int4" else x.float()[:, None]
    scales = (groups.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups * (1 / scales)).round().double() * scales).view(x.shape)


class Norm:
    """The weight of an RMS norm, with its struct."""

    def __init__(self, width: int, seed: int = 50) -> None:
        self.weight = (1 + 0.2 * random(width, seed=seed)).bfloat16().float()
        self.struct = NormStruct(self.weight.data_ptr(), EPS)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), EPS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    gate_up: Matrix
    down: Matrix

    @staticmethod
    def draw(schemes: Sequence[str], hidden: int, width: int, *, bias: bool = False, seed: int = 0) -> Mlp:
        """`schemes` are those of gate_up and down."""
        return Mlp(
            gate_up=Matrix.draw(schemes[0], 2 * width, hidden, bias=bias, seed=seed),
            down=Matrix.draw(schemes[1], hidden, width, bias=bias, seed=seed + 2),
        )

    @property
    def struct(self) -> MlpStruct:
        return MlpStruct(self.gate_up.linear.struct, self.down.linear.struct)

    def __call__(self, normed: Tensor) -> Tensor:
        """[N, h] -> [N, h] in float64"""
        gate, up = self.gate_up.product(normed).chunk(2, dim=1)
        return self.down.product((F.silu(gate) * up).float())


class Bank:
    """Experts and the table of their addresses, in which those never `used` have none."""

    def __init__(self, experts: Sequence[Mlp], used: Sequence[int] | None = None) -> None:
        self.experts = experts
        self._structs = [expert.struct for expert in experts]
        addresses = [
            ctypes.addressof(struct) if used is None or number in used else None
            for number, struct in enumerate(self._structs)
        ]
        self.table = (ctypes.c_void_p * len(experts))(*addresses)

    def __call__(self, normed: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[N, h] with chosen and shares [N, K] -> [N, h] in float64"""
        out = torch.zeros(normed.shape, dtype=torch.float64)
        for number, expert in enumerate(self.experts):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                out.index_add_(0, tokens, expert(normed[tokens]) * shares[tokens, places, None])
        return out


class Router:
    def __init__(
        self, num_experts: int, width: int, num_chosen: int, *, correction: bool = False, norm_min: float = 1e-12
    ) -> None:
        self.weight = random(num_experts, width, seed=60) * (2 / width**0.5)
        self.correction = 0.1 * random(1, num_experts, seed=61) if correction else None
        self.num_chosen, self.norm_min = num_chosen, norm_min
        address = None if self.correction is None else self.correction.data_ptr()
        self.struct = RouterStruct(self.weight.data_ptr(), address, num_experts, width, num_chosen, norm_min)


def choice(num_tokens: int, num_experts: int, num_chosen: int, seed: int = 70) -> tuple[Tensor, Tensor]:
    """Random experts, different ones for a token, and shares."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts, generator=draw)[:num_chosen] for _ in range(num_tokens)]
    chosen = torch.stack(rows) if rows else torch.empty((0, num_chosen), dtype=torch.int64)
    return chosen, torch.rand(chosen.shape, generator=draw)
