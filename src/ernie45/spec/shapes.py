"""ModelSpec: the shape and constants of one model, and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie45.errors import ConfigError

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPE_NAMES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Far above any model; what asks for more is refused before something is built by it.
_MAX_HEADS = 2**14
_MAX_LAYERS = 2**14
_MAX_MATRIX_VALUES = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """The routed experts of a mixture-of-experts model.

    Layer i has them if `first_layer` <= i <= `last_layer` and (i + 1) is a multiple of `layer_interval`; the others
    have a dense MLP. `intermediate_size` is one expert's width. The shared experts are one MLP of
    `num_shared_experts` times that width, and `norm_min` is the least sum that the chosen probabilities are divided
    by. `has_correction_bias`: a tensor corrects the selection, unless the config says that there is none.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    num_shared_experts: int
    first_layer: int
    last_layer: int
    layer_interval: int
    norm_min: float
    has_correction_bias: bool

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"config.json: moe_k {self.experts_per_token} is more than moe_num_experts {self.num_experts}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )

    def in_layer(self, layer: int) -> bool:
        """Whether this layer has routed experts."""
        return self.first_layer <= layer <= self.last_layer and (layer + 1) % self.layer_interval == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSpec:
    """What a vision-language model has beside the text trunk.

    The tower is a transformer of `num_layers` layers of width `hidden_size` over square patches of `patch_size` pixels;
    the resampler joins `spatial_merge_size`² patches, and `temporal_merge_size` frames, into one token.
    `norm_eps` is the tower's, `rope_theta` that of its rotary embedding. Of the text trunk's rotary frequencies the
    last `num_time_frequencies` turn with time, the others with height and width in turns. `experts` are the routed
    experts of picture tokens, in the same layers as those of the text.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_channels: int
    patch_size: int
    spatial_merge_size: int
    temporal_merge_size: int
    norm_eps: float
    rope_theta: float
    num_time_frequencies: int
    experts: ExpertSpec

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"config.json: vision_config.hidden_size {self.hidden_size} does not divide into {self.num_heads} heads"
                " of a multiple of 4",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        if (self.spatial_merge_size, self.temporal_merge_size) != (2, 2):
            raise ConfigError(
                f"config.json: the resampler merges {self.spatial_merge_size} x {self.spatial_merge_size} patches of"
                f" {self.temporal_merge_size} frames, and ernie45 only computes 2 x 2 of 2",
                hint="another value would change every answer; please report the checkpoint that has it",
            )
        widest = max(self.intermediate_size, self.num_channels * self.patch_size**2, 8 * self.hidden_size)
        if widest * self.hidden_size * 8 > _MAX_MATRIX_VALUES:
            raise ConfigError(
                f"config.json: vision_config describes a matrix of {widest} x {self.hidden_size * 8} values",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channels · patch_size²."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The shape and constants of one model.

    `head_dim` is independent of `hidden_size / num_heads`. `tied` is the config's word on whether the output head is
    the embedding, None if it says nothing; the files decide (a stored `lm_head.weight` is used). `dtype` is the
    checkpoint's, None if the config says nothing. `experts` is None in a dense model, `vision` in a text
    model. `num_mtp_layers` is how many multi-token-prediction layers the files may carry for speculative decoding;
    plain decoding does without.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    use_bias: bool
    tied: bool | None
    dtype: DtypeName | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    experts: ExpertSpec | None = None
    vision: VisionSpec | None = None
    num_mtp_layers: int = 0
    unknown_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        if self.head_dim % 2:
            raise ConfigError(f"config.json: head_dim {self.head_dim} is odd", hint="rotary embeddings need pairs")
        if self.num_layers > _MAX_LAYERS:
            raise ConfigError(
                f"config.json: num_hidden_layers {self.num_layers} is more than {_MAX_LAYERS}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        if self.num_heads > _MAX_HEADS:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_heads} is more than {_MAX_HEADS}",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        if self.vision is not None and self.vision.num_time_frequencies >= self.head_dim // 2:
            raise ConfigError(
                f"config.json: freq_allocation {self.vision.num_time_frequencies} leaves none of {self.head_dim // 2} "
                "frequencies to height and width",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )
        widths = [self.vocab_size, self.intermediate_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim]
        if self.experts is not None:
            widths += [self.experts.num_experts, self.experts.intermediate_size]
            widths += [self.experts.intermediate_size * self.experts.num_shared_experts]
        if self.vision is not None:
            widths += [self.vision.experts.num_experts, self.vision.experts.intermediate_size]
        if max(widths) * self.hidden_size > _MAX_MATRIX_VALUES:
            raise ConfigError(
                f"config.json describes a matrix of {max(widths)} x {self.hidden_size} (hidden_size) values",
                hint="the file is damaged or not an ERNIE 4.5 config",
            )

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds for one token: 2 · layers · kv heads · head_dim."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim
