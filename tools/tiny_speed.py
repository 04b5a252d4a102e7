"""transformers' vision-language layers rearranged for training on a CPU: the same numbers from fewer, larger steps."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeMoeBlock,
    Ernie4_5_VLMoeVisionAttention,
    apply_rotary_pos_emb_vision,
)


def speed_up(model: nn.Module) -> None:
    """Replace the forward functions of a model's blocks of experts and of its vision attention."""
    for module in model.modules():
        if isinstance(module, Ernie4_5_VLMoeMoeBlock):
            module.forward = types.MethodType(_experts_by_rows, module)
        elif isinstance(module, Ernie4_5_VLMoeVisionAttention):
            module.forward = types.MethodType(_attend_by_length, module)


def _experts_by_rows(
    self: Ernie4_5_VLMoeMoeBlock, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None
) -> tuple[Tensor, None]:
    """Whole rows go to the two banks, where transformers picks single elements. Gives no router logits."""
    rows = hidden_states.flatten(0, 1)
    if moe_mm_token_type_ids is None:
        mixed = self.text_moe(rows)[0].view_as(rows)
    else:
        is_vision = moe_mm_token_type_ids.flatten().bool()
        order = torch.cat([(~is_vision).nonzero().flatten(), is_vision.nonzero().flatten()])
        num_vision = int(is_vision.sum())
        ordered = rows.index_select(0, order)
        text, vision = ordered.split([len(rows) - num_vision, num_vision])
        both = torch.cat([self.text_moe(text)[0].view_as(text), self.vision_moe(vision)[0].view_as(vision)])
        mixed = both.index_select(0, order.argsort())
    return mixed.view_as(hidden_states) + self.shared_experts(hidden_states), None


def _attend_by_length(
    self: Ernie4_5_VLMoeVisionAttention,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_kwargs: object,
) -> Tensor:
    """Pictures and frames of equal length attend as one batch, where transformers takes them one by one."""
    lengths = cu_seqlens.diff()
    orders, shapes = [], []
    for length in lengths.unique().tolist():
        starts = cu_seqlens[:-1][lengths == length]
        orders.append((starts[:, None] + torch.arange(length)).flatten())
        shapes.append((len(starts), length))
    order = torch.cat(orders)
    mixed = self.qkv(hidden_states).index_select(0, order)
    query, key, value = mixed.view(len(order), 3, self.num_heads, -1).unbind(1)
    cos, sin = (table.index_select(0, order) for table in position_embeddings)
    query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
    sizes = [rows * length for rows, length in shapes]
    attended = []
    for shape, q, k, v in zip(shapes, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (tensor.view(*shape, self.num_heads, -1).transpose(1, 2) for tensor in (q, k, v))
        weights = torch.softmax(q @ k.mT * self.scaling, dim=-1, dtype=torch.float32).to(v.dtype)
        attended.append((weights @ v).transpose(1, 2).flatten(2).flatten(0, 1))
    projected: Tensor = self.proj(torch.cat(attended).index_select(0, order.argsort()))
    return projected
