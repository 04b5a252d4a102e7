"""How a checkpoint takes pictures and clips: its processor's files, and what the caller sets."""

from __future__ import annotations

from pathlib import Path

from ernie45.errors import ConfigError, InvalidRequestError, UnsupportedError
from ernie45.memory.budget import CPU_MAX_FRAME_PIXELS, CPU_MAX_PIXELS
from ernie45.prompting.media import VisionInput
from ernie45.spec import ModelSpec
from ernie45.types.limits import MediaLimits
from ernie45.vision import read_settings
from ernie45.vision.timestamps import FONT_NAME


def read_vision_input(
    folder: Path, spec: ModelSpec, *, on_cpu: bool, max_pixels: int | None, media_limits: MediaLimits | None
) -> VisionInput | None:
    """How the model takes media: as its processor's files say, and with fewer pixels where it runs on a CPU; None for a
    model that reads text only.

    Raises:
        InvalidRequestError: an argument of the wrong kind or range.
        UnsupportedError: one was given for a text model.
        ConfigError: the files do not belong to the model.
    """
    if not isinstance(media_limits, MediaLimits | None):
        raise InvalidRequestError(
            f"media_limits must be MediaLimits, not {type(media_limits).__name__}",
            hint="e.g. ernie45.MediaLimits(max_bytes=5_000_000)",
        )
    if spec.vision is None:
        for name, value in (("max_pixels", max_pixels), ("media_limits", media_limits)):
            if value is not None:
                raise UnsupportedError(
                    f"{name}= was given, but this model reads text only", hint="leave it out for a text model"
                )
        return None
    settings = read_settings(folder)
    least = settings.factor**2
    if max_pixels is not None and (
        isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < least
    ):
        raise InvalidRequestError(
            f"max_pixels must be a whole number from {least}, not {max_pixels!r}", hint="leave it out for the default"
        )
    if (settings.patch_size, settings.merge_size) != (spec.vision.patch_size, spec.vision.spatial_merge_size):
        raise ConfigError(
            f"the processor's files have patches of {settings.patch_size} pixels, {settings.merge_size} to a side of a"
            f" token, but config.json has {spec.vision.patch_size} and {spec.vision.spatial_merge_size}",
            hint="they belong to another model: fetch the checkpoint's files again",
        )
    font = folder / FONT_NAME
    default_pixels = min(settings.max_pixels, CPU_MAX_PIXELS) if on_cpu else settings.max_pixels
    default_frame_pixels = settings.max_frame_pixels
    if on_cpu:
        default_frame_pixels = min(default_frame_pixels, max(settings.min_frame_pixels, CPU_MAX_FRAME_PIXELS))
    return VisionInput(
        settings=settings,
        max_pixels=max_pixels or default_pixels,
        max_frame_pixels=min(max_pixels, settings.max_frame_pixels) if max_pixels else default_frame_pixels,
        limits=media_limits or MediaLimits(),
        font=font if font.is_file() else None,
    )
