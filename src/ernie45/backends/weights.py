"""Building the decoder's parts from a checkpoint's tensors, by their -PT names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ernie45.backends.decoder import (
    Attention,
    Decoder,
    DecoderLayer,
    DenseMLP,
    ExpertBank,
    ExpertMLP,
    Norm,
    Router,
)
from ernie45.checkpoint.read import TensorSource
from ernie45.kernels.linear import Linear, packs
from ernie45.kernels.ops import RotaryTable
from ernie45.spec import ExpertSpec, ModelSpec


class WeightBuilder:
    """Reads the weights of one checkpoint into `dtype` on `device`, and puts the parts of a Decoder together."""

    def __init__(self, spec: ModelSpec, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, source, dtype, device
        # Weights that get packed are read into one buffer, over and over: a fresh one each time would leave holes in
        # the heap, a tenth of the model in all.
        self._staging = self.empty((0,)) if packs(dtype, device) else None

    def decoder(self, context_tokens: int) -> Decoder:
        """The whole text trunk."""
        spec = self.spec
        embedding = self.tensor((spec.vocab_size, spec.hidden_size), "model.embed_tokens.weight")
        return Decoder(
            spec=spec,
            embedding=embedding,
            layers=tuple(self.layer(i) for i in range(spec.num_layers)),
            norm=self.norm("model.norm.weight"),
            head=self.head(embedding),
            rotary=RotaryTable(
                head_dim=spec.head_dim,
                theta=spec.rope_theta,
                context_tokens=context_tokens,
                device=self.device,
                num_time_frequencies=0 if spec.vision is None else spec.vision.num_time_frequencies,
            ),
        )

    def layer(self, index: int) -> DecoderLayer:
        """One block."""
        prefix = f"model.layers.{index}."
        has_experts = self.spec.experts is not None and self.spec.experts.in_layer(index)
        return DecoderLayer(
            attention_norm=self.norm(prefix + "input_layernorm.weight"),
            attention=self.attention(prefix + "self_attn."),
            mlp_norm=self.norm(prefix + "post_attention_layernorm.weight"),
            mlp=self.experts(prefix + "mlp.")
            if has_experts
            else self.mlp(prefix + "mlp.", self.spec.intermediate_size, has_bias=self.spec.use_bias),
        )

    def attention(self, prefix: str) -> Attention:
        spec = self.spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        heads = {prefix + "q_proj": query_size, prefix + "k_proj": kv_size, prefix + "v_proj": kv_size}
        return Attention(
            qkv=self.linear(spec.hidden_size, heads, has_bias=spec.use_bias),
            out=self.linear(query_size, {prefix + "o_proj": spec.hidden_size}, has_bias=spec.use_bias),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )

    def mlp(self, prefix: str, width: int, *, has_bias: bool) -> DenseMLP:
        hidden_size = self.spec.hidden_size
        return DenseMLP(
            gate_up=self.linear(
                hidden_size, {prefix + "gate_proj": width, prefix + "up_proj": width}, has_bias=has_bias
            ),
            down=self.linear(width, {prefix + "down_proj": hidden_size}, has_bias=has_bias),
        )

    def experts(self, prefix: str) -> ExpertMLP:
        experts = self.spec.experts
        assert experts is not None
        shared = None
        if experts.num_shared_experts:
            width = experts.num_shared_experts * experts.intermediate_size
            shared = self.mlp(prefix + "shared_experts.", width, has_bias=self.spec.use_bias)
        # The two banks of a vision-language model lie in one row: experts, and rows of the correction bias.
        text, vision = experts, None if self.spec.vision is None else self.spec.vision.experts
        text_gate = self.gate(prefix + "gate.weight", text)
        vision_gate = None if vision is None else self.gate(prefix + "gate.weight_1", vision)
        correction = None
        if text.has_correction_bias:
            correction = self.empty((1 if vision is None else 2, text.num_experts), torch.float32)
            self.source.read_into(correction, {prefix + "moe_statics.e_score_correction_bias": len(correction)})
        return ExpertMLP(
            text=self.bank(prefix, text, text_gate, 0, None if correction is None else correction[:1]),
            vision=None
            if vision is None or vision_gate is None
            else self.bank(
                prefix, vision, vision_gate, text.num_experts, None if correction is None else correction[1:]
            ),
            shared=shared,
        )

    def gate(self, name: str, experts: ExpertSpec) -> Tensor:
        """A router's weight, in float32 whatever the model's dtype, as published."""
        weight = self.empty((experts.num_experts, self.spec.hidden_size), torch.float32)
        self.source.read_into(weight, {name: experts.num_experts})
        return weight

    def bank(self, prefix: str, experts: ExpertSpec, gate: Tensor, first: int, correction: Tensor | None) -> ExpertBank:
        """A router with this weight, and its experts from number `first` on."""
        # With use_bias, Baidu's routed experts have biases and transformers' have none: the files decide.
        has_bias = f"{prefix}experts.{first}.down_proj.bias" in self.source
        return ExpertBank(
            router=Router(
                weight=gate,
                correction=correction,
                experts_per_token=experts.experts_per_token,
                norm_min=experts.norm_min,
            ),
            experts=tuple(
                self.mlp(f"{prefix}experts.{number}.", experts.intermediate_size, has_bias=has_bias)
                for number in range(first, first + experts.num_experts)
            ),
        )

    def linear(self, in_features: int, parts: Mapping[str, int], *, has_bias: bool) -> Linear:
        """One matrix out of several stored ones: `parts` are their names (without ".weight") and output widths."""
        out_features = sum(parts.values())
        weight = self.unpacked(out_features, in_features)
        self.source.read_into(weight, {f"{name}.weight": width for name, width in parts.items()})
        bias = None
        if has_bias:
            bias = self.empty((out_features,))
            self.source.read_into(bias, {f"{name}.bias": width for name, width in parts.items()})
        return Linear(weight, bias)

    def head(self, embedding: Tensor) -> Linear:
        """The files decide: an output head of its own is used, whatever the config says, else the embedding serves."""
        spec = self.spec
        bias = None
        if "lm_head.bias" in self.source:
            bias = self.tensor((spec.vocab_size,), "lm_head.bias")
        if "lm_head.weight" in self.source or spec.tied is False:
            return Linear(self.tensor((spec.vocab_size, spec.hidden_size), "lm_head.weight"), bias)
        return Linear(embedding, bias, pack=False)  # packing would double it: the embedding is looked up by row

    def norm(self, name: str) -> Norm:
        return Norm(weight=self.tensor((self.spec.hidden_size,), name), eps=self.spec.rms_norm_eps)

    def tensor(self, shape: tuple[int, ...], name: str) -> Tensor:
        out = self.empty(shape)
        self.source.read_into(out, {name: shape[0]})
        return out

    def unpacked(self, out_features: int, in_features: int) -> Tensor:
        """Room for a weight that is about to become a Linear."""
        num_values = out_features * in_features
        if self._staging is None:
            return self.empty((out_features, in_features))
        if self._staging.numel() < num_values:
            self._staging = self.empty((num_values,))
        return self._staging[:num_values].view(out_features, in_features)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
