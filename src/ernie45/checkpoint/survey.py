"""Asking a checkpoint for tensors without reading them: what would be read, how much it is, what would be left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import Tensor

from ernie45.checkpoint.headers import CheckpointIndex
from ernie45.checkpoint.layouts import Layout
from ernie45.checkpoint.read import find_reads
from ernie45.types.reports import ReadTensor


@final
class HeaderSurvey:
    """Answers like a TensorReader, from the headers alone: names and shapes are checked, nothing is read.

    A backend built from it (on torch's "meta" device) shows whether the real build can succeed. `read_bytes` is what
    the tensors asked for take in the files.
    """

    def __init__(self, index: CheckpointIndex, layout: Layout) -> None:
        self._index = index
        self._layout = layout
        self._read: dict[str, ReadTensor] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._layout.locate(name).key in self._index.tensors

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        """Check that the tensors of `parts` are there and fit the rows of `out`. Raises TensorError."""
        for read in find_reads(self._index, self._layout, out, parts):
            key = read.info.name
            self._read[key] = ReadTensor(
                key=key,
                names=self._layout.names_in(key),
                transposed=read.transposed,
                fused=len(parts) > 1,
            )

    @property
    def read_bytes(self) -> int:
        return sum(self._index.tensors[key].num_bytes for key in self._read)

    def read(self) -> tuple[ReadTensor, ...]:
        """What was asked for, in file order."""
        return tuple(self._read[key] for key in self._index.tensors if key in self._read)

    def unread(self) -> tuple[str, ...]:
        """Stored names of the tensors that were not asked for, in file order."""
        return tuple(key for key in self._index.tensors if key not in self._read)
