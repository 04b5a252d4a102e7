"""The dense ERNIE 4.5 backend: builds a Decoder from a -PT checkpoint's tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ernie45.backends.base import Batch, Step
from ernie45.backends.decoder import Attention, Decoder, DecoderLayer, DenseMLP, Norm
from ernie45.kernels.linear import Linear, packs
from ernie45.kernels.ops import RotaryTable
from ernie45.spec import ModelSpec


class TensorSource(Protocol):
    """Where named tensors come from. Asking for one that is missing or has another shape raises TensorError."""

    def __contains__(self, name: object) -> bool: ...

    def read_into(self, name: str, out: Tensor) -> None: ...


class DenseBackend:
    """A dense model's weights on one device, in one dtype."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.spec: ModelSpec = decoder.spec
        self.dtype: torch.dtype = decoder.embedding.dtype
        self.device: torch.device = decoder.embedding.device

    def forward(self, batch: Batch) -> Step:
        return Step(logits=self._decoder(batch))


def build_dense(
    spec: ModelSpec, source: TensorSource, *, dtype: torch.dtype, device: torch.device, context_tokens: int
) -> DenseBackend:
    """Read every weight of a dense -PT checkpoint straight into its place (query, key and value into one matrix,
    gate and up into another).

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    return DenseBackend(_Builder(spec, source, dtype, device).decoder(context_tokens))


class _Builder:
    def __init__(self, spec: ModelSpec, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, source, dtype, device
        # Weights that get packed are read into one buffer, over and over: a fresh one each time would leave holes in
        # the heap, a tenth of the model in all.
        self._staging = self.empty((0,)) if packs(dtype, device) else None

    def decoder(self, context_tokens: int) -> Decoder:
        spec = self.spec
        embedding = self.tensor((spec.vocab_size, spec.hidden_size), "model.embed_tokens.weight")
        return Decoder(
            spec=spec,
            embedding=embedding,
            layers=tuple(self.layer(f"model.layers.{i}.") for i in range(spec.num_layers)),
            norm=self.norm("model.norm.weight"),
            head=self.head(embedding),
            rotary=RotaryTable(
                head_dim=spec.head_dim,
                theta=spec.rope_theta,
                context_tokens=context_tokens,
                device=self.device,
            ),
        )

    def layer(self, prefix: str) -> DecoderLayer:
        spec = self.spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return DecoderLayer(
            attention_norm=self.norm(prefix + "input_layernorm.weight"),
            attention=Attention(
                qkv=self.linear(
                    spec.hidden_size,
                    {
                        attention + "q_proj": query_size,
                        attention + "k_proj": kv_size,
                        attention + "v_proj": kv_size,
                    },
                ),
                out=self.linear(query_size, {attention + "o_proj": spec.hidden_size}),
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
            ),
            mlp_norm=self.norm(prefix + "post_attention_layernorm.weight"),
            mlp=DenseMLP(
                gate_up=self.linear(
                    spec.hidden_size,
                    {mlp + "gate_proj": spec.intermediate_size, mlp + "up_proj": spec.intermediate_size},
                ),
                down=self.linear(spec.intermediate_size, {mlp + "down_proj": spec.hidden_size}),
            ),
        )

    def linear(self, in_features: int, parts: dict[str, int]) -> Linear:
        """One matrix out of several stored ones: `parts` are their names (without ".weight") and output widths."""
        out_features = sum(parts.values())
        weight = self.unpacked(out_features, in_features)
        bias = self.empty((out_features,)) if self.spec.use_bias else None
        first = 0
        for name, width in parts.items():
            self.source.read_into(name + ".weight", weight[first : first + width])
            if bias is not None:
                self.source.read_into(name + ".bias", bias[first : first + width])
            first += width
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
        self.source.read_into(name, out)
        return out

    def unpacked(self, out_features: int, in_features: int) -> Tensor:
        """Room for a weight that is about to become a Linear."""
        num_values = out_features * in_features
        if self._staging is None:
            return self.empty((out_features, in_features))
        if self._staging.numel() < num_values:
            self._staging = self.empty((num_values,))
        return self._staging[:num_values].view(out_features, in_features)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)
