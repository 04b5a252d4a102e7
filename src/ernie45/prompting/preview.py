"""What the pictures and clips of a conversation will cost: they are opened and measured, nothing is encoded."""

from __future__ import annotations

from ernie45.devices import product_rate
from ernie45.memory.media import encoding_bytes, encoding_operations, num_media_tokens, trunk_operations
from ernie45.prompting.media import VisionInput
from ernie45.prompting.messages import MediaPart, check_messages
from ernie45.prompting.prompter import Prompter
from ernie45.spec import ModelSpec
from ernie45.types.messages import Conversation
from ernie45.types.previews import MediaPreview
from ernie45.vision import open_image, probe_video
from ernie45.vision.patches import frame_size, image_size

_NO_LIMIT = 2**62


def preview_media(
    messages: Conversation, prompter: Prompter, *, spec: ModelSpec, device: str, dtype: str
) -> list[MediaPreview]:
    """Preview each picture and clip of a conversation in order, for a model that runs on `device` in `dtype`.

    Seconds are operations over the rate of a product of the vision tower's size, measured on the first call.

    Raises:
        InvalidRequestError: no conversation, media for a model that reads text only, or a picture or clip that cannot
            be read (`MediaError`).
    """
    checked = check_messages(messages)
    parts = [part for message in checked for part in message.media]
    if not parts:
        return []
    vision = prompter.vision_for(checked)
    assert spec.vision is not None
    rate = product_rate(device, dtype, in_features=spec.vision.hidden_size, out_features=spec.vision.intermediate_size)
    return [_preview(part, vision, spec, 4 if dtype == "float32" else 2, rate) for part in parts]


def _preview(
    part: MediaPart, vision: VisionInput, spec: ModelSpec, bytes_per_value: int, operations_per_second: float
) -> MediaPreview:
    assert spec.vision is not None
    num_frames, width, height = _measured(part, vision)
    most = vision.max_pixels_of(part)
    resized = image_size if part.kind == "image" else frame_size
    size = resized((width, height), vision.settings, max_pixels=most)
    unlimited = resized((width, height), vision.settings, max_pixels=_NO_LIMIT)
    patch_size = vision.settings.patch_size
    grid = (num_frames, size[1] // patch_size, size[0] // patch_size)
    num_tokens = num_media_tokens(grid, spec.vision)
    operations = encoding_operations(grid, spec) + trunk_operations(num_tokens, spec)
    return MediaPreview(
        kind=part.kind,
        width=width,
        height=height,
        resized_width=size[0],
        resized_height=size[1],
        max_pixels=None if size == unlimited else most,
        num_frames=num_frames,
        num_tokens=num_tokens,
        memory_bytes=encoding_bytes(grid, spec, bytes_per_value),
        seconds=operations / operations_per_second,
    )


def _measured(part: MediaPart, vision: VisionInput) -> tuple[int, int, int]:
    """Frames that are shown, width and height."""
    if part.kind == "video":
        return probe_video(part.source, vision.settings, limits=vision.limits, fps=part.fps)
    return 1, *open_image(part.source, limits=vision.limits).size
