"""Operations and bytes of pictures and clips. The numbers were worked out by hand, product by product."""

from __future__ import annotations

import pytest

from ernie45.memory.media import (
    encoding_bytes,
    encoding_operations,
    frames_per_part,
    num_media_tokens,
    trunk_operations,
)
from ernie45.spec import ExpertSpec, ModelSpec, VisionSpec


def experts_of(width: int) -> ExpertSpec:
    return ExpertSpec(
        num_experts=4,
        experts_per_token=2,
        intermediate_size=width,
        num_shared_experts=1,
        first_layer=1,
        last_layer=1,
        layer_interval=1,
        norm_min=1e-12,
        has_correction_bias=True,
    )


VISION = VisionSpec(
    num_layers=3,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_channels=3,
    patch_size=2,
    spatial_merge_size=2,
    temporal_merge_size=2,
    norm_eps=1e-6,
    rope_theta=10000.0,
    num_time_frequencies=1,
    experts=experts_of(5),
)
SPEC = ModelSpec(
    model_type="ernie4_5_moe_vl",
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    vocab_size=100,
    max_context_tokens=100,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    use_bias=False,
    tied=True,
    dtype="float32",
    bos_token_id=1,
    eos_token_ids=(2,),
    experts=experts_of(6),
    vision=VISION,
)
PICTURE = (1, 4, 6)
CLIP = (4, 4, 6)


def test_tokens_are_windows_and_of_a_clip_pairs_of_them() -> None:
    assert num_media_tokens(PICTURE, VISION) == 6
    assert num_media_tokens(CLIP, VISION) == 12


def test_encoding_counts_every_product() -> None:
    # Embedding 2 * 24 * 12 * 8; three layers of 24 patches at 8 * 64 + 4 * 24 * 8 + 4 * 8 * 12; 6 windows at
    # 4 * 32 * 32; 6 tokens at 6 * 32 * 32 + 2 * 32 * 8.
    assert encoding_operations(PICTURE, SPEC) == 4_608 + 119_808 + 24_576 + 39_936
    # Four frames: four times the patches, each of which sees no more than before; twice the tokens.
    assert encoding_operations(CLIP, SPEC) == 4 * (4_608 + 119_808 + 24_576) + 2 * 39_936


def test_the_trunk_runs_the_experts_of_pictures() -> None:
    # Attention 8 * (8 + 4 + 4 + 8) in both layers; the first has a dense MLP 3 * 8 * 16, the second a router 4 * 8, two
    # experts 3 * 8 * 5 and the shared one 3 * 8 * 6. Attention of 6 tokens to 6, half masked, over 2 * 4 values.
    weights = 2 * 192 + 384 + (32 + 240 + 144)
    assert trunk_operations(6, SPEC) == 2 * 6 * weights + 2 * 36 * 8 * 2


def test_bytes_are_patches_features_and_the_towers_attention() -> None:
    assert encoding_bytes(PICTURE, SPEC, 4) == 24 * 12 + 6 * 8 * 4 + 24 * 8 * 36
    assert encoding_bytes(PICTURE, SPEC, 2) == 24 * 12 + 6 * 8 * 2 + 24 * 8 * 24


def test_a_long_clip_takes_attention_of_two_frames_only() -> None:
    assert encoding_bytes((10, 40, 40), SPEC, 2) == 16_000 * 12 + 2_000 * 8 * 2 + 2 * 1_600 * 8 * 24


@pytest.mark.parametrize(
    ("grid", "num_frames"),
    [(PICTURE, 1), ((1, 100, 100), 1), (CLIP, 4), ((180, 20, 20), 10), ((10, 40, 40), 2), ((180, 100, 100), 2)],
)
def test_frames_are_encoded_in_pairs_within_a_limit(grid: tuple[int, int, int], num_frames: int) -> None:
    assert frames_per_part(grid) == num_frames
