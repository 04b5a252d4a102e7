"""Pictures and clips for training: prepared as the package prepares them, and given to transformers' model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tiny_tokenizer import NUM_PIECES, SPECIAL_TOKENS
from torch import Tensor

from ernie45.types.media import Media, PlacedMedia
from ernie45.vision import VisionSettings, prepare_image, rotary_positions
from ernie45.vision.patches import prepare_frames
from ernie45.vision.timestamps import draw_time

MIN_PIXELS: Final = 56 * 56
MAX_PIXELS: Final = 224 * 224
SETTINGS: Final = VisionSettings(
    min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, min_frame_pixels=MIN_PIXELS, max_frame_pixels=MAX_PIXELS
)
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
MOE_TYPES: Final = "moe_mm_token_type_ids"
# The token type of every placeholder, start and end marker: 1 for pictures, 2 for clips.
TYPES: Final = {
    NUM_PIECES + place: 1 if name.startswith("<|IMAGE_") else 2
    for place, name in enumerate(SPECIAL_TOKENS)
    if name.startswith(("<|IMAGE_", "<|VIDEO_"))
}


def prepare(part: Mapping[str, Any], frames_per_second: float | None) -> Media:
    """An `image` or `video` part of a message as patches; a clip gets its times drawn where a rate is given."""
    if part["type"] == "image":
        return prepare_image(part["image"], SETTINGS)
    frames = part["video"]
    if frames_per_second is not None:
        frames = [draw_time(frame, place / frames_per_second, None) for place, frame in enumerate(frames)]
    return prepare_frames(frames, SETTINGS)


def media_inputs(ids: Tensor, rows: Sequence[Sequence[PlacedMedia]]) -> dict[str, Tensor]:
    """What the model takes besides the ids [B, T] of a batch whose rows hold these; {} where no row holds any."""
    if not any(rows):
        return {}
    num_columns = ids.shape[1]
    positions = [rotary_positions(num_columns, placed, merge_size=SETTINGS.merge_size) for placed in rows]
    types = torch.zeros_like(ids)
    for token_id, token_type in TYPES.items():
        types[ids == token_id] = token_type
    inputs = {MOE_TYPES: types, "position_ids": torch.stack(positions, dim=1).permute(2, 1, 0).contiguous()}
    for kind, patches_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [item.media for placed in rows for item in placed if item.media.kind == kind]
        if media:
            inputs[patches_name] = normalize(torch.cat([item.patches for item in media]))
            inputs[grid_name] = torch.tensor([item.grid for item in media])
    return inputs


def normalize(patches: Tensor) -> Tensor:
    """uint8 patches [P, 3 · patch · patch] in the tower's range, float32."""
    area = SETTINGS.patch_size**2
    mean = torch.tensor(CLIP_MEAN).repeat_interleave(area)
    std = torch.tensor(CLIP_STD).repeat_interleave(area)
    return (patches / 255 - mean) / std


def write_processor_files(folder: Path) -> None:
    """Write how pictures and clips are to be prepared, by the names of transformers and of the published processors."""
    common = {
        "patch_size": SETTINGS.patch_size,
        "temporal_patch_size": 2,
        "merge_size": SETTINGS.merge_size,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "processor_class": "Ernie4_5_VLMoeProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    image = {
        **common,
        "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
    }
    video = {
        **common,
        "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
        "fps": SETTINGS.frames_per_second,
        "min_frames": SETTINGS.min_frames,
        "max_frames": SETTINGS.max_frames,
    }
    for name, value in (("preprocessor_config.json", image), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
