"""The members of the tiny family: their shapes, and how they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from tiny_prompts import PicturePrompts, PlainPrompts, Prompts, ThinkingPrompts
from tiny_speed import speed_up
from tiny_tokenizer import NUM_PIECES, SPECIAL_TOKENS, TinyTokenizer
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
)

NUM_ROWS: Final = 2048  # a little more than the tokenizer has, as in the published checkpoints
TRUNK: Final = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "use_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}

TinyModel: TypeAlias = Ernie4_5ForCausalLM | Ernie4_5_MoeForCausalLM | Ernie4_5_VLMoeForConditionalGeneration


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One of the models. `build` makes it with fresh weights in float32 from torch's random state.

    After the model its head for multi-token prediction is trained for `mtp_steps`; with 0 it has none.
    """

    name: str
    build: Callable[[], TinyModel]
    make_prompts: Callable[[TinyTokenizer], Prompts]
    mtp_steps: int = 0


def build_dense() -> Ernie4_5ForCausalLM:
    """The shape of 0.3B."""
    return Ernie4_5ForCausalLM(Ernie4_5Config(**TRUNK))


def build_moe() -> Ernie4_5_MoeForCausalLM:
    """The shape of 21B-A3B: one dense layer, then layers of routed experts beside two shared ones."""
    config = Ernie4_5_MoeConfig(
        **TRUNK,
        moe_intermediate_size=128,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_layer_interval=1,
        experts_implementation="grouped_mm",
    )
    model = Ernie4_5_MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):  # transformers starts it at 0: every token to the same experts
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_vl() -> Ernie4_5_VLMoeForConditionalGeneration:
    """The shape of VL-28B-A3B: a bank of text experts and one of vision experts, and a tower for pictures."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [11, 11, 10]}
    token_ids = {name: NUM_PIECES + place for place, name in enumerate(SPECIAL_TOKENS)}
    config = Ernie4_5_VLMoeConfig(
        text_config={
            **TRUNK,
            "rope_parameters": rope,
            "moe_intermediate_size": [128, 128],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        vision_config={"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256},
        image_token_id=token_ids["<|IMAGE_PLACEHOLDER|>"],
        video_token_id=token_ids["<|VIDEO_PLACEHOLDER|>"],
        image_start_token_id=token_ids["<|IMAGE_START|>"],
        image_end_token_id=token_ids["<|IMAGE_END|>"],
        video_start_token_id=token_ids["<|VIDEO_START|>"],
        video_end_token_id=token_ids["<|VIDEO_END|>"],
        tie_word_embeddings=True,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
    )
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    speed_up(model)
    return model


MEMBERS: Final = {
    "tiny-dense": Member(name="ernie45/tiny-dense", build=build_dense, make_prompts=PlainPrompts),
    "tiny-moe": Member(name="ernie45/tiny-moe", build=build_moe, make_prompts=ThinkingPrompts, mtp_steps=400),
    "tiny-vl": Member(name="ernie45/tiny-vl", build=build_vl, make_prompts=PicturePrompts),
}
