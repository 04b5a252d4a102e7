from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.vision.settings import IMAGE_MEAN, IMAGE_STD, VisionSettings, read_settings

PUBLISHED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "image_processor_type": "SomeProcessor",
    "min_pixels": 3136,
    "max_pixels": 4842768,
    "merge_size": 2,
    "patch_size": 14,
    "temporal_conv_size": 2,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoint_without_processor_files_has_the_published_values(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == VisionSettings()
    assert read_settings(write(tmp_path, preprocessor_config=PUBLISHED)) == VisionSettings()
    assert VisionSettings().factor == 28


def test_the_published_form(tmp_path: Path) -> None:
    changed = {"min_pixels": 784, "max_pixels": 50_000, "patch_size": 7, "spatial_conv_size": 4, "merge_size": None}
    settings = read_settings(write(tmp_path, preprocessor_config=PUBLISHED | changed))
    assert settings == VisionSettings(min_pixels=784, max_pixels=50_000, patch_size=7, merge_size=4)


IMAGE = {"size": {"shortest_edge": 900, "longest_edge": 90_000}, "patch_size": 7, "merge_size": 4}
VIDEO = {
    "size": {"shortest_edge": 800, "longest_edge": 80_000},
    "fps": 4,
    "min_frames": 2,
    "max_frames": 20,
    "temporal_patch_size": 2,
    "draw_on_frames": True,
    "num_frames": None,
}
BOTH = VisionSettings(
    patch_size=7,
    merge_size=4,
    min_pixels=900,
    max_pixels=90_000,
    min_frame_pixels=800,
    max_frame_pixels=80_000,
    frames_per_second=4,
    min_frames=2,
    max_frames=20,
)


def test_the_form_of_transformers(tmp_path: Path) -> None:
    assert read_settings(write(tmp_path, preprocessor_config=IMAGE, video_preprocessor_config=VIDEO)) == BOTH


def test_the_nested_form_comes_first(tmp_path: Path) -> None:
    write(tmp_path, preprocessor_config={"min_pixels": 1}, video_preprocessor_config={"fps": 9})
    write(tmp_path, processor_config={"image_processor": IMAGE, "video_processor": VIDEO, "processor_class": "X"})
    assert read_settings(tmp_path) == BOTH


def test_a_pictures_limits_do_not_become_those_of_frames(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, preprocessor_config=IMAGE))
    assert (settings.min_frame_pixels, settings.max_frame_pixels) == (299 * 28 * 28, 1196 * 28 * 28)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers.models.ernie4_5_vl_moe import image_processing_pil_ernie4_5_vl_moe as reference

    reference.Ernie4_5_VLMoeImageProcessorPil().save_pretrained(tmp_path)
    assert read_settings(tmp_path) == VisionSettings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("do_normalize", "yes"),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_mean", [0.48145466, 0.4578275]),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, 0.5]),
        ("image_std", ["0.26862954", 0.26130258, 0.27577711]),
        ("rescale_factor", 1.0),
        ("rescale_factor", 1 / 127.5),
        ("resample", 2),
        ("resample", "bicubic"),
        ("temporal_conv_size", 4),
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config", "video_preprocessor_config"])
def test_what_would_change_the_pixels_is_refused(tmp_path: Path, file: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        read_settings(write(tmp_path, **{file: {key: value}}))
    assert caught.value.hint


@pytest.mark.parametrize(("key", "value"), [("num_frames", 8), ("draw_on_frames", False), ("temporal_patch_size", 1)])
def test_what_would_change_the_frames_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        read_settings(write(tmp_path, video_preprocessor_config={key: value}))


@pytest.mark.parametrize(
    "config",
    [
        {"min_pixels": -1},
        {"min_pixels": 0},
        {"min_pixels": "3136"},
        {"max_pixels": 2.5},
        {"max_pixels": True},
        {"max_pixels": 10**12},
        {"min_pixels": 5_000_000},
        {"patch_size": 0},
        {"patch_size": 14.0},
        {"patch_size": [14, 14]},
        {"patch_size": 100_000},
        {"merge_size": 1000},
        {"merge_size": 2, "spatial_conv_size": 4},
        {"min_pixels": 3136, "size": {"shortest_edge": 784}},
        {"size": 224},
        {"size": [224, 224]},
    ],
)
def test_absurd_values_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(write(tmp_path, preprocessor_config=config))
    assert caught.value.hint


@pytest.mark.parametrize(
    "config", [{"fps": 0}, {"fps": "2"}, {"fps": 1e9}, {"min_frames": 200}, {"max_frames": 10**6}, {"min_frames": 1.5}]
)
def test_absurd_values_of_clips_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_settings(write(tmp_path, video_preprocessor_config=config))


def test_pictures_and_clips_must_agree_on_patches(tmp_path: Path) -> None:
    write(tmp_path, preprocessor_config={"patch_size": 14}, video_preprocessor_config={"patch_size": 16})
    with pytest.raises(ConfigError, match="patch_size is 14 and 16"):
        read_settings(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"a"', '{"a": 1, "a": 2}', '{"image_processor": [1]}'])
def test_malformed_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(ConfigError):
        read_settings(tmp_path)
