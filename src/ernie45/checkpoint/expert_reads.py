"""Reading the routed experts of a checkpoint one at a time, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch

from ernie45.checkpoint.adapter import Adapter
from ernie45.checkpoint.headers import TensorInfo
from ernie45.checkpoint.open import Checkpoint, expert_tensors, open_source
from ernie45.checkpoint.packed import check_values
from ernie45.checkpoint.staged_reads import StagedReader

_SCALES = ".row_scales"
_READY = (".panels", _SCALES)


@final
class ExpertReader:
    """Reads all tensors of one expert at once, for one thread. `source` then has them as a build asks for them, until
    the next are staged."""

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter | None, tensors: Mapping[str, tuple[TensorInfo, ...]]
    ) -> None:
        self._staged, self._tensors = StagedReader(), tensors
        self.source = open_source(checkpoint, adapter, reader=self._staged)

    def stage(self, prefix: str, room: memoryview | None) -> tuple[int, Mapping[str, int]] | None:
        """Read the expert whose -PT names begin so: "model.layers.3.mlp.experts.17.". One that is stored as the native
        kernels have it in memory is read into `room`, if there is one and it fits. Returns where in the room it begins,
        and how far from there each of its tensors, by the rest of its name; None if it is not there. What lies
        there has been checked as a build would check it.

        Raises CheckpointError, or CorruptFileError, where a file is gone, cannot be read or is cut short; TensorError
        where a scale in the room is not finite.
        """
        tensors = self._tensors[prefix]
        is_ready = all(info.name.endswith(_READY) for info in tensors)
        places = self._staged.stage(tensors, room if is_ready else None)
        if places is None:
            return None
        for info in tensors:
            scales = self._staged.view(info) if info.name.endswith(_SCALES) else None
            if scales is not None:
                check_values(info.name, torch.frombuffer(scales, dtype=torch.float32))
        first = min(places)
        return first, {
            info.name.removeprefix(prefix): place - first for info, place in zip(tensors, places, strict=True)
        }


def expert_readers(checkpoint: Checkpoint, adapter: Adapter | None) -> Callable[[], ExpertReader]:
    """What opens a reader, for each thread that asks for one."""
    tensors = expert_tensors(checkpoint)
    return lambda: ExpertReader(checkpoint, adapter, tensors)
