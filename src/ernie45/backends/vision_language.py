"""The vision-language backend: the text trunk with two banks of experts, a vision tower and a resampler."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ernie45.backends.base import Batch, BuildOptions, Step
from ernie45.backends.decoder import Decoder
from ernie45.backends.native_stage import prefix_tokens
from ernie45.backends.vision_tower import (
    LayerNorm,
    MergeMLP,
    PatchEmbedding,
    Resampler,
    TowerAttention,
    TowerLayer,
    VisionTower,
)
from ernie45.backends.weights import WeightBuilder
from ernie45.checkpoint.read import TensorSource
from ernie45.presets import WeightPart
from ernie45.spec import ModelSpec, VisionSpec


class VisionLanguageBackend:
    """A vision-language model's weights, and the dtype of its arithmetic. `device` is where token ids go in."""

    def __init__(
        self,
        decoder: Decoder,
        tower: VisionTower,
        resampler: Resampler,
        options: BuildOptions,
        weight_bytes: Mapping[WeightPart, int],
    ) -> None:
        self._decoder = decoder
        self._tower = tower
        self._resampler = resampler
        self._vision_device = torch.device(options.placement.vision)
        self.spec: ModelSpec = decoder.spec
        self.dtype: torch.dtype = options.dtype
        self.device: torch.device = torch.device(options.placement.embedding)
        self.weight_bytes: Mapping[WeightPart, int] = weight_bytes
        self.prefix_tokens: int = prefix_tokens(decoder)
        self.expert_caches = decoder.expert_caches
        self.routing = decoder.routing

    def forward(self, batch: Batch) -> Step:
        return self._decoder(batch)

    def encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [P, values] of `grid` = frames (1, or an even number), rows and columns -> features [tokens, h]"""
        features = self._tower(patches.to(self._vision_device), grid, self.dtype)
        return self._resampler(features, grid[0], self._tower.spec.spatial_merge_size**2).to(self.device)


def build_vision_language(spec: ModelSpec, source: TensorSource, options: BuildOptions) -> VisionLanguageBackend:
    """Read every weight of a vision-language checkpoint straight into its place. Tower and resampler are never
    quantised.

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    assert spec.vision is not None
    builder = WeightBuilder(spec, source, options)
    decoder = builder.decoder()
    vision = builder.on(options.placement.vision)
    return VisionLanguageBackend(
        decoder, _tower(vision, spec.vision), _resampler(vision, spec.vision), options, builder.placed
    )


def _tower(builder: WeightBuilder, spec: VisionSpec) -> VisionTower:
    width, prefix = spec.hidden_size, "vision_model."
    patches = builder.linear(spec.patch_values, {prefix + "patch_embed.proj": width}, part="vision", has_bias=False)
    return VisionTower(
        spec=spec,
        embedding=PatchEmbedding(projection=patches, num_channels=spec.num_channels),
        layers=tuple(_layer(builder, spec, f"{prefix}blocks.{index}.") for index in range(spec.num_layers)),
        norm=_norm(builder, spec, prefix + "ln", width),
    )


def _layer(builder: WeightBuilder, spec: VisionSpec, prefix: str) -> TowerLayer:
    width = spec.hidden_size
    return TowerLayer(
        attention_norm=_norm(builder, spec, prefix + "norm1", width),
        attention=TowerAttention(
            qkv=builder.linear(width, {prefix + "attn.qkv": 3 * width}, part="vision", has_bias=True),
            out=builder.linear(width, {prefix + "attn.proj": width}, part="vision", has_bias=True),
            num_heads=spec.num_heads,
        ),
        mlp_norm=_norm(builder, spec, prefix + "norm2", width),
        up=builder.linear(width, {prefix + "mlp.fc1": spec.intermediate_size}, part="vision", has_bias=True),
        down=builder.linear(spec.intermediate_size, {prefix + "mlp.fc2": width}, part="vision", has_bias=True),
    )


def _resampler(builder: WeightBuilder, spec: VisionSpec) -> Resampler:
    prefix, merged = "model.resampler_model.", spec.hidden_size * spec.spatial_merge_size**2
    hidden_size = builder.spec.hidden_size
    return Resampler(
        spatial=_merge(builder, spec, prefix + "spatial_linear.", merged, merged),
        temporal=_merge(builder, spec, prefix + "temporal_linear.", spec.temporal_merge_size * merged, merged),
        out=builder.linear(merged, {prefix + "mlp": hidden_size}, part="vision", has_bias=True),
        norm=builder.norm(prefix + "after_norm.weight", part="vision"),
    )


def _merge(builder: WeightBuilder, spec: VisionSpec, prefix: str, in_features: int, out_features: int) -> MergeMLP:
    return MergeMLP(
        first=builder.linear(in_features, {prefix + "0": out_features}, part="vision", has_bias=True),
        second=builder.linear(out_features, {prefix + "2": out_features}, part="vision", has_bias=True),
        norm=_norm(builder, spec, prefix + "3", out_features),
    )


def _norm(builder: WeightBuilder, spec: VisionSpec, name: str, width: int) -> LayerNorm:
    return LayerNorm(
        weight=builder.tensor((width,), name + ".weight", part="vision"),
        bias=builder.tensor((width,), name + ".bias", part="vision"),
        eps=spec.norm_eps,
    )
