"""Pictures and clips to patches."""

from ernie45.vision.image import open_image
from ernie45.vision.patches import prepare_image
from ernie45.vision.positions import rotary_positions
from ernie45.vision.settings import VisionSettings, read_settings
from ernie45.vision.video import prepare_video, probe_video

__all__ = [
    "VisionSettings",
    "open_image",
    "prepare_image",
    "prepare_video",
    "probe_video",
    "read_settings",
    "rotary_positions",
]
