"""How many parameters a model has, part by part: arithmetic on its shape, without a file."""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.spec import ExpertSpec, ModelSpec, VisionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Parameters by part.

    `head` is 0 where the embedding is the head. `active_experts` are those of the `routed_experts` that one text token
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
        use, and with one matrix of the vocabulary's height, for an untied embedding is read in a single row.

        A picture's token goes through as many of the `vision_experts`, which are narrower, instead; tower and resampler
        run once for the whole picture. It is not counted here.
        """
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
    """Count a model's parameters from its shape.

    A head that the config does not tie to the embedding is counted. With `use_bias`, biases of attention, dense and
    shared MLPs are counted; those of routed experts and of the head, which only some writers store, are not.
    """
    hidden, experts, vision = spec.hidden_size, spec.experts, spec.vision
    embedding = spec.vocab_size * hidden
    layer_attention = _attention(spec)
    layer_mlp = _mlp(spec, spec.intermediate_size)
    num_moe = sum(experts.in_layer(layer) for layer in range(spec.num_layers)) if experts else 0
    routed, active, router = _experts(spec, experts) if experts else (0, 0, 0)
    vision_experts, _, vision_router = _experts(spec, vision.experts) if vision else (0, 0, 0)
    shared = 0
    if experts is not None and experts.num_shared_experts:
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
        vision_experts=vision_experts,
        vision_router=vision_router,
        vision_tower=count_vision_tower(vision) if vision else 0,
        resampler=count_resampler(vision, hidden_size=hidden) if vision else 0,
    )


def count_vision_tower(vision: VisionSpec) -> int:
    """Parameters of the vision tower; layers as in transformers' `Ernie4_5_VLMoeVisionTransformerPretrainedModel`.

    Patches through a linear layer without bias; then blocks of two LayerNorms, fused query/key/value, projection and
    a two-layer MLP, all with bias; a last LayerNorm.
    """
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = _linear(width, 3 * width) + _linear(width, width)
    block = 2 * _layer_norm(width) + attention + _linear(width, inner) + _linear(inner, width)
    return vision.patch_values * width + vision.num_layers * block + _layer_norm(width)


def count_resampler(vision: VisionSpec, *, hidden_size: int) -> int:
    """Parameters of the resampler; layers as in transformers' `Ernie4_5_VLMoeVariableResolutionResamplerModel`.

    `spatial_merge_size`² patches side by side through a two-layer MLP and a LayerNorm; `temporal_merge_size` frames of
    that through another; then a linear layer to the trunk's `hidden_size` and an RMSNorm. All linear layers have
    biases.
    """
    width = vision.hidden_size * vision.spatial_merge_size**2
    spatial = 2 * _linear(width, width) + _layer_norm(width)
    temporal = _linear(vision.temporal_merge_size * width, width) + _linear(width, width) + _layer_norm(width)
    return spatial + temporal + _linear(width, hidden_size) + hidden_size


def _experts(spec: ModelSpec, experts: ExpertSpec) -> tuple[int, int, int]:
    """Routed experts, those of them that one token goes through, and routers with their correction biases."""
    num_layers = sum(experts.in_layer(layer) for layer in range(spec.num_layers))
    expert = 3 * spec.hidden_size * experts.intermediate_size
    router = experts.num_experts * (spec.hidden_size + (experts.has_correction_bias is not False))
    return (
        num_layers * experts.num_experts * expert,
        num_layers * experts.experts_per_token * expert,
        num_layers * router,
    )


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
