"""What a picture or clip costs: floating-point operations and bytes, from its grid and the model's shape.

Shape letters: F frames, S patches of a frame, P = F · S, T tokens, w the tower's width, m = 4 · w a merge window's,
h the trunk's hidden size, b bytes of a number. A product [n, i] · [i, o] is 2 · n · i · o operations; what is done
number by number is left out.
"""

from __future__ import annotations

from ernie45.spec import ModelSpec, VisionSpec

Grid = tuple[int, int, int]
"""Patches of a picture or clip: frames (1 for a picture), rows, columns."""

PATCHES_PER_PART = 4096
"""A clip's frames are encoded so many patches at a time, but at least two frames; a picture is encoded whole."""


def frames_per_part(grid: Grid) -> int:
    """How many frames are encoded at a time: an even number, or 1 for a picture."""
    num_frames, rows, columns = grid
    return min(max(2, PATCHES_PER_PART // (rows * columns) // 2 * 2), num_frames)


def num_media_tokens(grid: Grid, spec: VisionSpec) -> int:
    """F · S / 4, and for a clip half of that: its frames are joined in pairs."""
    num_frames, rows, columns = grid
    num_windows = num_frames * rows * columns // spec.spatial_merge_size**2
    return num_windows // spec.temporal_merge_size if num_frames > 1 else num_windows


def encoding_operations(grid: Grid, spec: ModelSpec) -> int:
    """Operations of the vision tower and the resampler for one picture or clip.

    Patches to the tower's width, 2 · P · values · w. A layer: query, key, value and output 8 · P · w², attention within
    a frame 4 · P · S · w, the MLP of width I 4 · P · w · I. Merging windows 4 · (P / 4) · m², joining frames
    6 · T · m², to the trunk 2 · T · m · h.
    """
    vision = _vision(spec)
    width, num_patches = vision.hidden_size, _num_patches(grid)
    num_tokens, merged = num_media_tokens(grid, vision), vision.spatial_merge_size**2 * width
    frame_patches = grid[1] * grid[2]
    layer = 8 * width * width + 4 * frame_patches * width + 4 * width * vision.intermediate_size
    tower = num_patches * (2 * vision.patch_values * width + vision.num_layers * layer)
    num_windows = num_patches // vision.spatial_merge_size**2
    return tower + 4 * num_windows * merged**2 + num_tokens * (6 * merged**2 + 2 * merged * spec.hidden_size)


def trunk_operations(num_tokens: int, spec: ModelSpec) -> int:
    """Operations of running the tokens of one picture or clip through the text trunk, without the output head.

    Twice the weights of each layer that a picture's token meets (of the experts those of its own bank that are chosen,
    and the shared ones), and 2 · T² · heads · head_dim for attention to each other. What stands before them in the
    prompt is left out.
    """
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention_weights = spec.hidden_size * (2 * query + 2 * kv)
    weights = sum(attention_weights + _mlp_weights(spec, layer) for layer in range(spec.num_layers))
    return 2 * num_tokens * weights + 2 * num_tokens**2 * query * spec.num_layers


def encoding_bytes(grid: Grid, spec: ModelSpec, bytes_per_value: int) -> int:
    """Bytes that encoding one picture or clip takes at most, beside the loaded model.

    Of all frames the patches, a byte for each value, and the features, T · h · b. Of the frames that are encoded at a
    time, in the tower's attention: what the layer began with, its norm, query, key, value and the rotated query,
    6 · w · b a patch, and the key while it is rotated in float32, 12 · w.
    """
    vision = _vision(spec)
    kept = _num_patches(grid) * vision.patch_values
    kept += num_media_tokens(grid, vision) * spec.hidden_size * bytes_per_value
    part_patches = frames_per_part(grid) * grid[1] * grid[2]
    return kept + part_patches * vision.hidden_size * (6 * bytes_per_value + 12)


def _num_patches(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _vision(spec: ModelSpec) -> VisionSpec:
    assert spec.vision is not None
    return spec.vision


def _mlp_weights(spec: ModelSpec, layer: int) -> int:
    """Weights of a layer's MLP that one token of a picture meets; three matrices to an MLP."""
    text = spec.experts
    if text is None or not text.in_layer(layer):
        return 3 * spec.hidden_size * spec.intermediate_size
    vision = _vision(spec).experts
    width = vision.experts_per_token * vision.intermediate_size + text.num_shared_experts * text.intermediate_size
    return spec.hidden_size * (vision.num_experts + 3 * width)
