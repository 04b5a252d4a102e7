"""Where a loaded model's weights came from, so that they can be read once more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie45.checkpoint.adapter import WEIGHTS_FILE, Adapter, read_adapter
from ernie45.checkpoint.open import Checkpoint
from ernie45.errors import CheckpointError
from ernie45.presets import QuantPreset


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The checkpoint folder, the preset, the adapter and the dtype that a model was loaded with.

    Paths are absolute: the process may change its folder. `files` are the weight files as they were then: size in bytes
    and time of the last change in nanoseconds.
    """

    folder: Path
    preset: QuantPreset
    adapter: Adapter | None
    dtype: torch.dtype
    files: Mapping[Path, tuple[int, int]]

    @staticmethod
    def of(checkpoint: Checkpoint, preset: QuantPreset, adapter: Adapter | None, dtype: torch.dtype) -> Origin:
        """To be noted before the first weight is read."""
        paths = {info.file for info in checkpoint.index.tensors.values()}
        if adapter is not None:
            adapter = read_adapter(adapter.folder.absolute())
            paths.add(adapter.folder / WEIGHTS_FILE)
        return Origin(
            folder=checkpoint.folder.absolute(),
            preset=preset,
            adapter=adapter,
            dtype=dtype,
            files={path.absolute(): _state(path) for path in sorted(paths)},
        )

    def check_unchanged(self) -> None:
        """Raises CheckpointError where a weight file is gone, or another than the model was loaded from."""
        for path, loaded in self.files.items():
            if not path.is_file():
                raise CheckpointError(
                    f"{path}, which the model was loaded from, is not there any more",
                    hint="put the checkpoint back, or load it from where it is now",
                )
            if _state(path) != loaded:
                raise CheckpointError(
                    f"{path} has changed since the model was loaded: it had {loaded[0]:,} bytes, and now has "
                    f"{_state(path)[0]:,}, last written at another time",
                    hint="load the checkpoint again, then save it",
                )


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
