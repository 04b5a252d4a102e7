"""The head for multi-token prediction that -PT and Paddle checkpoints carry, as Baidu's training code (ERNIEKit 1.0.1,
ernie/modeling_moe.py) has it.

It stands at token i with the trunk's state there, before the last norm, and the embedding of token i + 1; each is
normalised, the embedding comes first, and [2h] -> h, one dense decoder layer, and the trunk's last norm and output head
give the logits of token i + 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.backends.base import Batch
from ernie45.backends.decoder import Decoder, DecoderLayer, Head, Layers, Norm, Stage
from ernie45.backends.native_stage import native_stage
from ernie45.backends.weights import WeightBuilder
from ernie45.kernels.linear import Embedding, Linear

PROJECTION = "model.mtp_linear_proj.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class MtpHead:
    """The head, on `device` beside the trunk's embedding. `head` is the trunk's last norm and output head."""

    device: torch.device
    embedding: Embedding
    embedding_norm: Norm
    hidden_norm: Norm
    projection: Linear
    layer: Layers
    head: Head
    head_device: torch.device

    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Run the batch's tokens, each beside the trunk's state [N, h] at the token before it, filling the KV slots of
        a cache with one layer -> float32 logits [M, V] of the wanted ones, on the output head's device."""
        embedded = self.embedding.lookup(batch.token_ids)
        x = self.projection(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        x = self.layer(x, batch)[batch.wanted]
        return self.head(x.to(self.head_device)) if len(x) else x.new_empty((0, 0))


def build_mtp_head(builder: WeightBuilder, decoder: Decoder) -> MtpHead:
    """Read the head's own weights to the device of the embedding, quantised as the preset says.

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    spec = builder.spec
    block = "model.mtp_block.0."
    layer = DecoderLayer(
        attention_norm=builder.norm(block + "input_layernorm.weight"),
        attention=builder.attention(block + "self_attn."),
        mlp_norm=builder.norm(block + "post_attention_layernorm.weight"),
        mlp=builder.mlp(block + "mlp.", spec.intermediate_size, part="dense_mlp", has_bias=spec.use_bias),
    )
    return MtpHead(
        device=builder.device,
        embedding=decoder.embedding,
        embedding_norm=builder.norm("model.mtp_emb_norm.0.weight"),
        hidden_norm=builder.norm("model.mtp_hidden_norm.0.weight"),
        projection=builder.linear(
            2 * spec.hidden_size,
            {PROJECTION: spec.hidden_size},
            part="dense_mlp",
            has_bias=f"{PROJECTION}.bias" in builder.source,
        ),
        layer=native_stage(Stage(device=builder.device, first=0, layers=(layer,), rotary=builder.rotary())),
        head=decoder.head,
        head_device=decoder.head_device,
    )
