"""Asking a checkpoint for tensors without reading them: what would be read, how much it is, what would be left over."""

from __future__ import annotations

from typing import final

from torch import Tensor

from ernie45.checkpoint.headers import CheckpointIndex
from ernie45.checkpoint.read import find_tensor


@final
class HeaderSurvey:
    """Answers like a TensorReader, from the headers alone: names and shapes are checked, nothing is read.

    A backend built from it (on torch's "meta" device) shows whether the real build can succeed. `weight_bytes` is what
    the tensors asked for take in memory, `read_bytes` what they take in the files.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._asked: set[str] = set()
        self.weight_bytes = 0
        self.read_bytes = 0

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def read_into(self, name: str, out: Tensor) -> None:
        """Check that `name` is there in the shape of `out`. Raises TensorError."""
        info = find_tensor(self._index, name, out)
        self._asked.add(name)
        self.weight_bytes += out.numel() * out.element_size()
        self.read_bytes += info.num_bytes

    def unread(self) -> tuple[str, ...]:
        """Names of the stored tensors that were not asked for, in file order."""
        return tuple(name for name in self._index.tensors if name not in self._asked)
