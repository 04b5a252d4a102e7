"""How a checkpoint wants its pictures and clips: sizes and frame rates, from its processor's config files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ernie45.checkpoint.headers import read_json
from ernie45.errors import ConfigError

# What pixels become before the first layer: value / 255, less the mean, over the deviation (CLIP's). It is computed
# with these numbers, so that a checkpoint that says otherwise would be answered wrongly.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_BICUBIC = 3
_TEMPORAL_MERGE = 2
_MOST = {"patch_size": 256, "merge_size": 16, "max_frames": 10_000, "frames_per_second": 240}
_MOST_PIXELS = 2**31 - 1
_HINT = "fetch the published processor files again; their values are those the weights were trained with"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSettings:
    """What preparing media goes by; the defaults are the published values.

    A picture is resized to between `min_pixels` and `max_pixels`, each frame of a clip to between `min_frame_pixels`
    and `max_frame_pixels`, both with sides that are multiples of `patch_size` · `merge_size`. A clip is sampled at
    `frames_per_second`, at least `min_frames` and at most `max_frames` in all.

    Raises ConfigError for what is not a number in range, and for a least above its most.
    """

    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 6177 * 28 * 28
    min_frame_pixels: int = 299 * 28 * 28
    max_frame_pixels: int = 1196 * 28 * 28
    frames_per_second: float = 2.0
    min_frames: int = 16
    max_frames: int = 180

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), _MOST.get(field.name, _MOST_PIXELS)
            whole = field.name != "frames_per_second"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value <= most:
                wanted = f"a {'whole ' if whole else ''}number above 0 and at most {most}"
                raise ConfigError(f"vision settings: {field.name} is {value!r:.100}", hint=f"it must be {wanted}")
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("min_frame_pixels", "max_frame_pixels"),
            ("min_frames", "max_frames"),
        ):
            if getattr(self, low) > getattr(self, high):
                values = f"{low} is {getattr(self, low)} and {high} is {getattr(self, high)}"
                raise ConfigError(f"vision settings: {values}", hint="the least must not be above the most")

    @property
    def factor(self) -> int:
        """Sides in pixels are multiples of this: one merge window."""
        return self.patch_size * self.merge_size


def read_settings(folder: Path) -> VisionSettings:
    """Read a checkpoint's processor files; where they are silent or missing, the published values count.

    Pictures: `image_processor` in processor_config.json, else preprocessor_config.json. Clips: `video_processor` in
    processor_config.json, else video_preprocessor_config.json. Both the published keys (min_pixels, spatial_conv_size)
    and those of transformers (size, merge_size) are known; others are ignored.

    Raises:
        ConfigError: a file is malformed, a value out of range, or it asks for another resizing or normalisation than
            is computed.
    """
    combined = _read(folder, "processor_config.json")
    image = _section(combined, "image_processor") or _read(folder, "preprocessor_config.json")
    video = _section(combined, "video_processor") or _read(folder, "video_preprocessor_config.json")
    for section, what in ((image, "pictures"), (video, "clips")):
        _check_pixels_computed(section, what)
    if video.get("num_frames") is not None:
        raise _not_computed("clips", "num_frames", video["num_frames"])
    if video.get("draw_on_frames") not in (None, True):
        raise _not_computed("clips", "draw_on_frames", video["draw_on_frames"])
    found: dict[str, Any] = {
        "patch_size": _agreed(image, video, "patch_size", "patch_size"),
        "merge_size": _agreed(image, video, "merge_size", "spatial_conv_size"),
        "min_pixels": _edge(image, "min_pixels", "shortest_edge"),
        "max_pixels": _edge(image, "max_pixels", "longest_edge"),
        "min_frame_pixels": _edge(video, "min_pixels", "shortest_edge"),
        "max_frame_pixels": _edge(video, "max_pixels", "longest_edge"),
        "frames_per_second": video.get("fps"),
        "min_frames": video.get("min_frames"),
        "max_frames": video.get("max_frames"),
    }
    return VisionSettings(**{key: value for key, value in found.items() if value is not None})


def _read(folder: Path, name: str) -> Mapping[str, Any]:
    return read_json(folder / name) if (folder / name).is_file() else {}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"processor_config.json: {key} is {section!r:.100}", hint=_HINT)
    return section


def _edge(section: Mapping[str, Any], key: str, size_key: str) -> object:
    """A limit in pixels: under its own name, or in `size` under either name."""
    size = section.get("size") or {}
    if not isinstance(size, dict):
        raise ConfigError(f"processor files: size is {size!r:.100}", hint="it must hold shortest_edge and longest_edge")
    return _one(key, [section.get(key), size.get(key), size.get(size_key)])


def _agreed(image: Mapping[str, Any], video: Mapping[str, Any], key: str, published_key: str) -> object:
    return _one(key, [section.get(name) for section in (image, video) for name in (key, published_key)])


def _one(key: str, values: list[object]) -> object:
    said = [value for value in values if value is not None]
    if any(value != said[0] for value in said):
        raise ConfigError(f"processor files: {key} is {said[0]!r:.60} and {said[-1]!r:.60}", hint=_HINT)
    return said[0] if said else None


def _check_pixels_computed(section: Mapping[str, Any], what: str) -> None:
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if section.get(key) not in (None, True):
            raise _not_computed(what, key, section[key])
    for key, computed in (
        ("image_mean", IMAGE_MEAN),
        ("image_std", IMAGE_STD),
        ("rescale_factor", (1 / 255,)),
        ("resample", (_BICUBIC,)),
        ("temporal_conv_size", (_TEMPORAL_MERGE,)),
    ):
        if section.get(key) is not None and not _close(section[key], computed):
            raise _not_computed(what, key, section[key])
    if what == "clips" and section.get("temporal_patch_size") not in (None, _TEMPORAL_MERGE):
        raise _not_computed(what, "temporal_patch_size", section["temporal_patch_size"])


def _close(value: object, computed: tuple[float, ...]) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) == len(computed) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isclose(v, c, rel_tol=1e-4)
        for v, c in zip(values, computed, strict=True)
    )


def _not_computed(what: str, key: str, value: object) -> ConfigError:
    return ConfigError(
        f"processor files: {key} is {value!r:.100} for {what}, and ernie45 computes only the published form",
        hint=_HINT,
    )
