"""The fixed prompts that a comparison with transformers runs, and how transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ernie45.spec import VisionSpec
from ernie45.types.media import Media, PlacedMedia
from ernie45.types.prompts import Prompt
from ernie45.vision.settings import IMAGE_MEAN, IMAGE_STD

NUM_POSITIONS = 16
_STEP = 7919  # a prime, so that the ids lie all over the vocabulary
_TOKENS_HIGH, _TOKENS_WIDE = 2, 3
_FIRST = 5  # of the picture's tokens


def text_prompt(num_token_ids: int) -> Prompt:
    """`NUM_POSITIONS` ids out of the first `num_token_ids`."""
    return Prompt(text="", token_ids=_ids(num_token_ids))


def picture_prompt(vision: VisionSpec, num_token_ids: int, media_ids: Mapping[str, int]) -> Prompt:
    """The same text with a picture of noise in it; `media_ids` by transformers' config key.

    Any id serves as a marker of start and end where theirs are not known: what they are goes by where they stand.
    """
    side = vision.spatial_merge_size
    grid = (1, _TOKENS_HIGH * side, _TOKENS_WIDE * side)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(
        256, (grid[1] * grid[2], vision.patch_values), dtype=torch.uint8, generator=generator, device="cpu"
    )
    num_tokens = _TOKENS_HIGH * _TOKENS_WIDE
    ids = list(_ids(num_token_ids))
    placeholder = media_ids["image_token_id"]
    ids = [other if other != placeholder else (other + 1) % num_token_ids for other in ids]
    ids[_FIRST - 1] = media_ids.get("image_start_token_id", ids[_FIRST - 1])
    ids[_FIRST] = media_ids.get("image_end_token_id", ids[_FIRST])
    ids[_FIRST:_FIRST] = [placeholder] * num_tokens
    media = Media(kind="image", patches=patches, grid=grid, num_tokens=num_tokens, digest=b"ernie45 verify")
    return Prompt(text="", token_ids=tuple(ids), media=(PlacedMedia(first=_FIRST, media=media),))


def transformers_inputs(prompt: Prompt) -> dict[str, torch.Tensor]:
    """What `Ernie4_5_VLMoeForConditionalGeneration` or a text model takes for a prompt of text and pictures."""
    inputs = {"input_ids": torch.tensor([prompt.token_ids])}
    if not prompt.media:
        return inputs
    kinds = torch.zeros_like(inputs["input_ids"], dtype=torch.int32)
    routed = kinds.clone()
    for item in prompt.media:
        kinds[0, item.first : item.end] = 1
        routed[0, item.first - 1 : item.end + 1] = 1
    return inputs | {
        "mm_token_type_ids": kinds,
        "moe_mm_token_type_ids": routed,
        "pixel_values": torch.cat([_normalized(item.media.patches) for item in prompt.media]),
        "image_grid_thw": torch.tensor([item.media.grid for item in prompt.media]),
    }


def _normalized(patches: torch.Tensor) -> torch.Tensor:
    values = patches.view(len(patches), len(IMAGE_MEAN), -1).float() / 255
    return ((values - torch.tensor(IMAGE_MEAN)[:, None]) / torch.tensor(IMAGE_STD)[:, None]).flatten(1)


def _ids(num_token_ids: int) -> tuple[int, ...]:
    return tuple((1 + number * _STEP) % num_token_ids for number in range(NUM_POSITIONS))
