"""The vision tower and the resampler: patches of a picture, or of a clip's frames, to tokens of the text trunk.

Written as the published model defines them (transformers' `Ernie4_5_VLMoeVisionTransformerPretrainedModel` and
`Ernie4_5_VLMoeVariableResolutionResamplerModel`). Shape letters: F frames, S patches of one frame, P = F · S, w the
tower's width, H heads, D head width, h the trunk's hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie45.backends.decoder import Norm
from ernie45.kernels.linear import Linear
from ernie45.spec import VisionSpec
from ernie45.vision.settings import IMAGE_MEAN, IMAGE_STD

# What works on one patch at a time does so on this many: the wide values inside an MLP then stay small.
_ROWS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchEmbedding:
    """`projection` [w, values of a patch]."""

    projection: Linear
    num_channels: int

    def __call__(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """Patches [P, values], uint8 or normalised already -> [P, w]"""
        return _by_rows(lambda rows: self.projection(self._normalized(rows).to(dtype)), patches)

    def _normalized(self, patches: Tensor) -> Tensor:
        if patches.dtype.is_floating_point:
            return patches
        channels = patches.view(len(patches), self.num_channels, -1).float() / 255
        mean = torch.tensor(IMAGE_MEAN, device=patches.device)[:, None]
        std = torch.tensor(IMAGE_STD, device=patches.device)[:, None]
        return ((channels - mean) / std).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerAttention:
    """Every patch sees all patches of its frame. `qkv` [3·w, w]."""

    qkv: Linear
    out: Linear
    num_heads: int

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, num_frames: int) -> Tensor:
        heads = self.qkv(x).view(num_frames, -1, 3, self.num_heads, x.shape[1] // self.num_heads)
        query, key = (_rotate_halves(heads[:, :, part], cos, sin).transpose(1, 2) for part in (0, 1))
        seen = F.scaled_dot_product_attention(query, key, heads[:, :, 2].transpose(1, 2))
        return self.out(seen.transpose(1, 2).reshape(x.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerLayer:
    """`up` and `down` are the MLP, with the quick form of GELU between them."""

    attention_norm: LayerNorm
    attention: TowerAttention
    mlp_norm: LayerNorm
    up: Linear
    down: Linear

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, num_frames: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, num_frames)
        return x + _by_rows(self._mlp, x)

    def _mlp(self, x: Tensor) -> Tensor:
        wide = self.up(self.mlp_norm(x))
        return self.down(wide.mul_(torch.sigmoid(1.702 * wide)))


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTower:
    spec: VisionSpec
    embedding: PatchEmbedding
    layers: tuple[TowerLayer, ...]
    norm: LayerNorm

    def __call__(self, patches: Tensor, grid: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Patches [P, values] by merge window, of `grid` = frames, rows and columns -> features [P, w]"""
        num_frames, rows, columns = grid
        x = self.embedding(patches, dtype)
        cos, sin = _plane_rotation(rows, columns, self.spec, patches.device)
        for layer in self.layers:
            x = layer(x, cos, sin, num_frames)
        return self.norm(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeMLP:
    """Joins what lies side by side in a row: two linear maps with a GELU between them, then a norm."""

    first: Linear
    second: Linear
    norm: LayerNorm

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(self.second(F.gelu(self.first(x))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Resampler:
    """2 × 2 patches to one, pairs of frames to one (a picture goes with itself), then to the trunk's width."""

    spatial: MergeMLP
    temporal: MergeMLP
    out: Linear
    norm: Norm

    def __call__(self, x: Tensor, num_frames: int, window: int) -> Tensor:
        """Features [P, w] of the tower, `window` patches in a merge window -> tokens [P / window (/ 2), h]"""
        merged = _by_rows(self.spatial, x.reshape(-1, window * x.shape[1]))
        frames = merged.view(num_frames, -1, merged.shape[1])
        pairs = torch.cat((frames[0::2], frames[1::2] if num_frames > 1 else frames), dim=-1).flatten(0, 1)
        return _by_rows(lambda rows: self.norm(self.out(self.temporal(rows))), pairs)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(rows) for rows in x.split(_ROWS)])


def _plane_rotation(rows: int, columns: int, spec: VisionSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, D/2] of the patches of a frame: half of the frequencies turn with the row, half with the
    column; θ^(-4i/D)."""
    half = spec.hidden_size // spec.num_heads // 2
    inverse = 1.0 / spec.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    merge = spec.spatial_merge_size
    places = torch.arange(rows * columns, device=device).view(rows // merge, merge, columns // merge, merge)
    places = places.transpose(1, 2).flatten()
    angles = torch.cat((places[:, None] // columns * inverse, places[:, None] % columns * inverse), dim=-1)
    return angles.cos()[:, None], angles.sin()[:, None]


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [F, S, H, D] in float32, each number of the first half with that of the second."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
