"""What a picture or clip will cost, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from ernie45.types.media import MediaKind

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaPreview:
    """What one picture or clip of a conversation will cost. `str(preview)` says it in a line.

    `width` and `height` are its own, upright; `resized_width` and `resized_height` what the model sees. `max_pixels` is
    the limit that made it smaller, None where none did. `num_frames` is 1 for a picture, and for a clip the frames that
    are shown. `num_tokens` are those it takes of the context. `memory_bytes` is an estimate of what encoding it takes
    beside the loaded model, `seconds` one of encoding it and running its tokens; a picture that was encoded already
    costs less.
    """

    kind: MediaKind
    width: int
    height: int
    resized_width: int
    resized_height: int
    max_pixels: int | None
    num_frames: int
    num_tokens: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        size = f"{self.width} x {self.height}"
        if self.kind == "video":
            size += f", {self.num_frames} frames"
        if (self.resized_width, self.resized_height) != (self.width, self.height):
            size += f" -> {self.resized_width} x {self.resized_height}"
        if self.max_pixels is not None:
            size += f" (limit of {self.max_pixels:,} pixels)"
        return f"{self.kind} {size}: {self.num_tokens:,} tokens, {self._memory()}, about {self._time()}"

    def _memory(self) -> str:
        mebibytes = self.memory_bytes / _MIB
        return f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"

    def _time(self) -> str:
        if self.seconds >= 120:
            return f"{self.seconds / 60:,.0f} min"
        return f"{self.seconds:.0f} s" if self.seconds >= 10 else f"{self.seconds:.2g} s"
