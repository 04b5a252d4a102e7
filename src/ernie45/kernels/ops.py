"""The decoder's other operations, written as the published models define them (transformers' `Ernie4_5ForCausalLM`
and `Ernie4_5_MoeForCausalLM`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, h] over its root mean square, computed in float32 and rounded before the weight [h] is applied."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [N, 2·I], gate half first -> silu(gate) · up [N, I]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


_ROUTED_ROWS = 16


def route(
    x: Tensor, weight: Tensor, correction: Tensor | None, num_chosen: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """Choose `num_chosen` (K) of E experts for each row of x [N, h], all in float32 -> numbers and shares [N, K].

    Chosen are the highest softmax(x · weightᵀ) + correction; the shares are the probabilities without the correction,
    over their sum or `norm_min`, whichever is more. weight [E, h], correction [1, E].
    """
    # A product of always as many rows: with another number a row's last bits may change, and with them the choice.
    blocks = [
        F.linear(F.pad(rows, (0, 0, 0, _ROUTED_ROWS - len(rows))), weight)[: len(rows)]
        for rows in x.float().split(_ROUTED_ROWS)
    ]
    probabilities = torch.cat(blocks).softmax(dim=-1)
    scores = probabilities if correction is None else probabilities + correction
    chosen = scores.topk(num_chosen, dim=-1).indices
    shares = probabilities.gather(-1, chosen)
    return chosen, shares / shares.sum(dim=-1, keepdim=True).clamp(min=norm_min)


class RotaryTable:
    """cos and sin [context, D/2] of the angles position · theta^(-2i/D), in float32.

    In a vision-language model the last `num_time_frequencies` turn with time, of the others every even one with height
    and every odd one with width.
    """

    __slots__ = ("_axes", "cos", "sin")

    def __init__(
        self,
        *,
        head_dim: int,
        theta: float,
        context_tokens: int,
        device: torch.device,
        num_time_frequencies: int = 0,
    ) -> None:
        inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(context_tokens, dtype=torch.float32)[:, None] * inverse
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)
        num_in_plane = head_dim // 2 - num_time_frequencies
        axes = [1 + index % 2 if index < num_in_plane else 0 for index in range(head_dim // 2)]
        self._axes = torch.tensor(axes, device=device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [N], or [N, 3] as time, height and width -> cos, sin [N, 1, D/2], to be broadcast over heads"""
        if positions.ndim == 1:
            return self.cos[positions][:, None], self.sin[positions][:, None]
        rows, columns = positions[:, self._axes], torch.arange(len(self._axes), device=positions.device)
        return self.cos[rows, columns][:, None], self.sin[rows, columns][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs (interleaved RoPE) of x [N, H, D] in float32; cos and sin [N, 1, D/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = x.new_empty(x.shape)
    pairs = rotated.unflatten(-1, (-1, 2))
    pairs[..., 0] = (even * cos).sub_(odd * sin)
    pairs[..., 1] = (odd * cos).add_(even * sin)
    return rotated


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of a sequence's last T tokens: query [T, H, D], keys and values [Hkv, S, D], S >= T -> [T, H·D].

    Query token t sees keys 0 … S - T + t; query head h uses key/value head h // (H / Hkv); scale 1/sqrt(D).
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, num_keys, _ = keys.shape
    if num_tokens == 1:
        # The query heads of one kv head stand as its query tokens: every key is read once, not once per query head.
        grouped = query.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, keys[None], values[None]).reshape(1, -1)
    if num_keys > num_tokens:
        return _attention_after_others(query, keys, values)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        is_causal=True,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(num_tokens, -1)


def _attention_after_others(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attention` of T tokens that see earlier ones as well, S > T."""
    num_tokens, num_keys = query.shape[0], keys.shape[1]
    # With the last token first, row t of the mask hides keys S - t and later: all rows are stretches of one line, S + T
    # numbers in place of a matrix of T · S.
    line = torch.zeros(num_keys + num_tokens - 1, dtype=query.dtype, device=query.device)
    line[num_keys:] = -torch.inf
    mask = line.as_strided((num_tokens, num_keys), (1, 1))
    if query.device.type != "cpu":
        mask = mask.contiguous()  # the kernels of GPUs want rows that begin at whole words
    out = F.scaled_dot_product_attention(
        query.flip(0).transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1).flip(0).reshape(num_tokens, -1)
