from __future__ import annotations

from typing import Any

import pytest

from ernie45.types.previews import MediaPreview

PHOTO: dict[str, Any] = {
    "kind": "image",
    "width": 1920,
    "height": 1080,
    "resized_width": 1316,
    "resized_height": 728,
    "max_pixels": 1_003_520,
    "num_frames": 1,
    "num_tokens": 1222,
    "memory_bytes": 45 * 2**20,
    "seconds": 24.2,
}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {},
            "image 1920 x 1080 -> 1316 x 728 (limit of 1,003,520 pixels): 1,222 tokens, 45 MiB, about 24 s",
        ),
        (
            {"max_pixels": None, "resized_width": 1932, "resized_height": 1092, "num_tokens": 2691},
            "image 1920 x 1080 -> 1932 x 1092: 2,691 tokens, 45 MiB, about 24 s",
        ),
        (
            {"width": 1316, "height": 728, "max_pixels": None, "memory_bytes": 2**18, "seconds": 0.0123},
            "image 1316 x 728: 1,222 tokens, 0.2 MiB, about 0.012 s",
        ),
        (
            {"kind": "video", "num_frames": 60, "num_tokens": 36_660, "seconds": 600.0, "memory_bytes": 2**31},
            "video 1920 x 1080, 60 frames -> 1316 x 728 (limit of 1,003,520 pixels): 36,660 tokens, 2,048 MiB, "
            "about 10 min",
        ),
    ],
)
def test_a_preview_in_a_line(fields: dict[str, Any], line: str) -> None:
    assert str(MediaPreview(**{**PHOTO, **fields})) == line
