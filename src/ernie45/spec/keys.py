"""The three classes of config keys.

*Read* keys become fields. *Neutral* keys do not change what we compute as long as they have the value listed here;
another value is an error, because ignoring it would give wrong tokens. Keys *without effect* are bookkeeping and
training settings. Everything else is *unknown* and ends up in `ModelSpec.unknown_keys`, which the load report warns
about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ernie45.errors import ConfigError

READ = {
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "use_bias",
    "tie_word_embeddings", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "num_nextn_predict_layers",
}  # fmt: skip

READ_OF_EXPERTS = {
    "moe_num_experts", "moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index",
    "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "moe_use_aux_free",
    "num_experts", "num_experts_per_tok",
}  # fmt: skip

# The value (or values) at which a key changes nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "compression_ratio": (1,),
    "scale_qk_coeff": (1,),
    "use_rmsnorm": (True,),
    "sliding_window": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "add_tail_layers": (False, 0),
    "moe_gate": ("topk", None),
    "moe_gate_act": ("softmax",),
    "moe_norm_gate_logits": (True,),
    "moe_use_hard_gate": (False,),
    "moe_group_experts": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Bookkeeping and training settings: no value of theirs touches inference.
WITHOUT_EFFECT = {
    "architectures", "auto_map", "transformers_version", "_name_or_path", "paddleformers_version", "source",
    "use_cache", "initializer_range", "attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout",
    "ignored_index", "weight_share_add_bias", "fuse_linear", "fuse_ln", "fuse_rms_norm", "fuse_rope", "fuse_swiglu",
    "token_balance_loss", "token_balance_seqlen", "return_dict", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_decoder", "pruned_heads",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "cls_token_id", "use_flash_attention",
    "enable_mtp_magic_send", "use_recompute_mtp", "multi_token_pred_lambda", "fuse_gate_detach_matmul",
    "global_aux_loss", "moe_aux_loss_lambda", "moe_orthogonal_loss_lambda", "moe_group_orthogonal_loss",
    "moe_z_loss_lambda", "moe_capacity", "moe_reverse_token_drop", "moe_dense_experts_token_type_id",
    "moe_multimodal_dispatch_use_allgather", "moe_all_to_all_dropout", "moe_group", "moe_use_size_all2all",
    "sinkhorn_2gate", "sinkhorn_temp", "output_router_logits", "router_aux_loss_coef",
    "quantization_config",  # opening a checkpoint refuses one that says anything
}  # fmt: skip

# Read of a vision-language model beside the text models' keys, in either writer's form.
READ_OF_VISION = {
    "im_patch_id", "vision_config", "text_config", "freq_allocation", "spatial_conv_size", "temporal_conv_size",
    "pixel_hidden_size", "mlp_layer_types", "image_token_id", "image_start_token_id", "image_end_token_id",
    "video_token_id", "video_start_token_id", "video_end_token_id",
}  # fmt: skip
NEUTRAL_OF_VISION: Mapping[str, tuple[object, ...]] = {
    "moe_use_hard_gate": (True,),  # each bank has its own tokens
    "moe_use_token_type_bias": (False,),
    "rope_3d": (True,),
    "use_temporal_conv": (True,),
    "cachekv_quant": (False,),
}
# erniekit's configs also hold how a training run was spread over machines, and which fused kernels it used.
WITHOUT_EFFECT_OF_VISION = {
    "mm_vocab_size", "max_text_id", "modality_detach", "moe_layer_feed_fake_token", "resampler_fuse_rms_norm",
    "use_recompute_resampler", "use_sparse_flash_attn", "use_var_len_flash_attn", "max_sequence_length",
    "bos_token_id", "eos_token_id", "context_parallel_degree", "dpo_config", "enable_delay_scale_loss",
    "fuse_sequence_parallel_allreduce", "fuse_softmax_mask", "micro_batch_size", "moe_dropout_prob", "moe_fuse_experts",
    "moe_group_origin", "moe_rank", "moe_world_size", "no_recompute_layers", "num_acc_steps",
    "offload_recompute_inputs", "pipeline_parallel_degree", "pp_recompute_interval", "pp_seg_method", "recompute",
    "recompute_granularity", "recompute_use_reentrant", "refined_recompute", "sep_parallel_degree", "sequence_parallel",
    "skip_recompute_ops", "tensor_parallel_output", "tensor_parallel_rank", "use_fused_dropout_add",
    "use_fused_head_and_loss_fn", "use_fused_linear", "use_fused_linear_cross_entropy", "use_fused_rms_norm",
    "use_fused_rope", "use_recompute_lm_head", "use_recompute_loss_fn", "use_recompute_moe",
    "use_sparse_head_and_loss_fn", "virtual_pp_degree",
}  # fmt: skip

READ_OF_TOWER = {
    "model_type", "depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "intermediate_size",
    "patch_size", "spatial_merge_size", "temporal_merge_size", "rms_norm_eps", "rope_parameters",
}  # fmt: skip
NEUTRAL_OF_TOWER: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("quick_gelu",),
    "attn_sep": (False,),
    "in_channels": (3,),  # red, green and blue
    "is_encoder_decoder": (False,),
}
WITHOUT_EFFECT_OF_TOWER = {
    "initializer_range", "attn_implementation", "vit_num_recompute_layers", "paddleformers_version", "dtype",
    "torch_dtype", "transformers_version", "architectures", "_name_or_path", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "num_attention_heads",
    "num_hidden_layers", "pp_data_balance", "recompute", "vit_first_fwd_bsz",
}  # fmt: skip


def check_neutral(config: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]], where: str = "") -> None:
    """Raise ConfigError where a key has a value that ernie45 does not compute; `where` goes before its name."""
    for key, allowed in neutral.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"config.json: {where}{key} is {config[key]!r}, and ernie45 only computes {key} = {wanted}",
                hint="another value would change every answer; please report the checkpoint that has it",
            )


def unknown_keys(config: Mapping[str, Any], *known: Iterable[str], where: str = "") -> tuple[str, ...]:
    """Keys of a config that are in none of the classes `known`, sorted, with `where` before their names."""
    return tuple(sorted(where + key for key in set(config).difference(*known)))
