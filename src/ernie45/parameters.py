"""How many parameters a model has, part by part: arithmetic on its shape, without a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ernie45.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters by part.

    `head` is 0 where the embedding is the head. `active_experts` are those of the `routed_experts` that one token
    goes through. `router` holds gates and correction biases, which are stored in float32; all else is stored in
    bfloat16. The `mtp` layers serve speculative decoding alone. The last four are 0 in a text model: the experts and
    routers that only picture tokens go through, the vision tower, and the resampler between tower and trunk.
    """

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    routed_experts: int
    active_experts: int
    shared_experts: int
    router: int
    norms: int
    mtp: int
    vision_experts: int = 0
    vision_router: int = 0
    vision_tower: int = 0
    resampler: int = 0

    @property
    def total(self) -> int:
        """All parameters but the MTP layers'."""
        trunk = self.embedding + self.head + self.attention + self.dense_mlp + self.norms
        experts = self.routed_experts + self.shared_experts + self.router
        return trunk + experts + self.vision_experts + self.vision_router + self.vision_tower + self.resampler

    @property
    def active(self) -> int:
        """What one text token goes through: the total without the experts not chosen, without what only pictures
        use, and with one matrix of the vocabulary's height, for an untied embedding is read in a single row."""
        vocabulary = self.head or self.embedding
        experts = self.active_experts + self.shared_experts + self.router
        return vocabulary + self.attention + self.dense_mlp + self.norms + experts

    @property
    def float32(self) -> int:
        """Parameters stored in float32, whatever the checkpoint's dtype: gates and correction biases."""
        return self.router + self.vision_router

    @property
    def stored_bytes(self) -> int:
        """Bytes of the `total` as published: 4 for each float32 parameter, 2 for each other (bfloat16)."""
        return 2 * self.total + 2 * self.float32


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """Count a text model's parameters from its shape.

    A head that the config does not tie to the embedding is counted. With `use_bias`, biases of attention, dense and
    shared MLPs are counted; those of routed experts and of the head, which only some writers store, are not.
    """
    hidden, experts = spec.hidden_size, spec.experts
    embedding = spec.vocab_size * hidden
    layer_attention = _attention(spec)
    layer_mlp = _mlp(spec, spec.intermediate_size)
    num_moe = sum(experts.in_layer(layer) for layer in range(spec.num_layers)) if experts else 0
    routed = active = shared = router = 0
    if experts is not None:
        expert = 3 * hidden * experts.intermediate_size
        routed = num_moe * experts.num_experts * expert
        active = num_moe * experts.experts_per_token * expert
        router = num_moe * experts.num_experts * (hidden + (experts.has_correction_bias is not False))
        if experts.num_shared_experts:
            shared = num_moe * _mlp(spec, experts.num_shared_experts * experts.intermediate_size)
    # Two norms in the layer, one of the embedding, one of the trunk's output; [embedding, output] -> hidden.
    mtp_layer = layer_attention + layer_mlp + 4 * hidden + 2 * hidden * hidden + (hidden if spec.use_bias else 0)
    return ParameterCount(
        embedding=embedding,
        head=0 if spec.tied else embedding,
        attention=spec.num_layers * layer_attention,
        dense_mlp=(spec.num_layers - num_moe) * layer_mlp,
        routed_experts=routed,
        active_experts=active,
        shared_experts=shared,
        router=router,
        norms=(2 * spec.num_layers + 1) * hidden,
        mtp=spec.num_mtp_layers * mtp_layer,
    )


def add_vision(text: ParameterCount, spec: ModelSpec, config: Mapping[str, Any]) -> ParameterCount:
    """The count of a vision-language model, from that of its text trunk.

    Args:
        text: the trunk's, as `count_parameters` gives it.
        spec: the trunk's shape.
        config: the model's config.json in the published dialect (`model_type` "ernie4_5_moe_vl"), of which the
            second of each `moe_…` pair (the picture tokens' experts) and the vision fields are read.
    """
    num_experts, width = config["moe_num_experts"][1], config["moe_intermediate_size"][1]
    num_moe = sum(spec.experts.in_layer(layer) for layer in range(spec.num_layers)) if spec.experts else 0
    return replace(
        text,
        vision_experts=num_moe * num_experts * 3 * spec.hidden_size * width,
        vision_router=num_moe * num_experts * (spec.hidden_size + 1),
        vision_tower=count_vision_tower(config["vision_config"]),
        resampler=count_resampler(
            pixel_hidden_size=config["pixel_hidden_size"],
            hidden_size=spec.hidden_size,
            spatial_merge=config["spatial_conv_size"],
            temporal_merge=config["temporal_conv_size"],
        ),
    )


def count_vision_tower(vision_config: Mapping[str, Any]) -> int:
    """Parameters of the vision tower; layers as in transformers' `Ernie4_5_VLMoeVisionTransformerPretrainedModel`.

    Patches through a linear layer without bias; then blocks of two LayerNorms, fused query/key/value, projection and
    a two-layer MLP, all with bias; a last LayerNorm.
    """
    width: int = vision_config["hidden_size"]
    depth: int = vision_config["depth"]
    inner: int = width * vision_config["mlp_ratio"]
    patches: int = vision_config["in_channels"] * vision_config["patch_size"] ** 2 * width
    attention = _linear(width, 3 * width) + _linear(width, width)
    block = 2 * _layer_norm(width) + attention + _linear(width, inner) + _linear(inner, width)
    return patches + depth * block + _layer_norm(width)


def count_resampler(*, pixel_hidden_size: int, hidden_size: int, spatial_merge: int, temporal_merge: int) -> int:
    """Parameters of the resampler; layers as in transformers' `Ernie4_5_VLMoeVariableResolutionResamplerModel`.

    `spatial_merge`² patches side by side through a two-layer MLP and a LayerNorm; `temporal_merge` frames of that
    through another; then a linear layer to `hidden_size` and an RMSNorm. All linear layers have biases.
    """
    width = pixel_hidden_size * spatial_merge**2
    spatial = 2 * _linear(width, width) + _layer_norm(width)
    temporal = _linear(temporal_merge * width, width) + _linear(width, width) + _layer_norm(width)
    return spatial + temporal + _linear(width, hidden_size) + hidden_size


def _attention(spec: ModelSpec) -> int:
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    biases = query + 2 * key + spec.hidden_size if spec.use_bias else 0
    return 2 * spec.hidden_size * (query + key) + biases


def _mlp(spec: ModelSpec, width: int) -> int:
    return 3 * spec.hidden_size * width + (2 * width + spec.hidden_size if spec.use_bias else 0)


def _linear(in_features: int, out_features: int) -> int:
    return in_features * out_features + out_features


def _layer_norm(width: int) -> int:
    return 2 * width
