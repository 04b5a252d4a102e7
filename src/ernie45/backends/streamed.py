"""Routed experts that are read from the checkpoint as they are chosen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, final

import torch

from ernie45.backends.base import Streaming
from ernie45.backends.decoder import DenseMLP
from ernie45.checkpoint.expert_reads import ExpertReader
from ernie45.checkpoint.read import TensorSource, bytes_of
from ernie45.checkpoint.staged_reads import BLOCK_BYTES
from ernie45.errors import CheckpointError
from ernie45.experts.cache import ExpertCache
from ernie45.kernels.library import work_alone
from ernie45.kernels.panels import PanelLinear, PanelMemory
from ernie45.memory.workspace import NUM_EXPERT_READERS
from ernie45.spec import ExpertSpec


class ExpertBuilder(Protocol):
    """`ernie45.backends.weights.WeightBuilder`."""

    def expert(self, prefix: str, experts: ExpertSpec, memory: PanelMemory) -> DenseMLP:
        """The expert of this -PT name prefix, in this memory where the native kernels serve."""
        ...

    def expert_is_in_panels(self, experts: ExpertSpec) -> bool:
        """Whether the native kernels work on the experts that it builds."""
        ...


OpenBuilder = Callable[[TensorSource], ExpertBuilder]


@final
class ExpertStore:
    """The experts of one bank in all layers, numbered from `first` on in the names of their tensors."""

    def __init__(
        self,
        streaming: Streaming,
        open_builder: OpenBuilder,
        experts: ExpertSpec,
        *,
        num_layers: int,
        first: int,
    ) -> None:
        num_slots = streaming.slots.vision if first else streaming.slots.text
        bank = streaming.banks[first > 0]
        slot_bytes = -(-bank.held_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._num_experts = experts.num_experts
        self.cache = ExpertCache(
            num_keys=num_layers * experts.num_experts,
            num_slots=num_slots,
            num_readers=NUM_EXPERT_READERS,
            expert_bytes=bank.stored_bytes,
            fill=_Filling(streaming, open_builder, experts, first, (num_slots, slot_bytes)),
        )

    def layer(self, index: int) -> StreamedExperts:
        """The table of one layer."""
        return StreamedExperts(self.cache, index * self._num_experts)


@dataclass(frozen=True, slots=True)
class _Landed:
    """An expert that was read straight into its slot: from byte `first` on, its tensors so far from there."""

    first: int
    offsets: Mapping[str, int]
    gate_up: PanelLinear
    down: PanelLinear

    def followed_by(self, first: int) -> DenseMLP:
        """The expert that now lies there from `first` on: without the checks and names of building one, which take time
        of the processors that the layers need."""
        num_bytes = first - self.first
        return DenseMLP(gate_up=self.gate_up.moved(num_bytes), down=self.down.moved(num_bytes))


@final
class _Filling:
    """Fills slots with experts, on several threads."""

    def __init__(
        self,
        streaming: Streaming,
        open_builder: OpenBuilder,
        experts: ExpertSpec,
        first: int,
        slots: tuple[int, int],
    ) -> None:
        """`slots` are how many there are, and the bytes of each."""
        self._streaming, self._open_builder = streaming, open_builder
        self._experts, self._first, self._slots = experts, first, slots
        self._threads = threading.local()
        self._lock, self._memory = threading.Lock(), torch.empty(0)
        self._landed: dict[int, _Landed] = {}  # by slot, what lay there last

    def __call__(self, key: int, slot: int) -> DenseMLP:
        layer, number = divmod(key, self._experts.num_experts)
        number += self._first
        prefix = f"model.layers.{layer}.mlp.experts.{number}."
        try:
            reader, builder = self._thread()
            room = self._room(slot)
            places = reader.stage(prefix, bytes_of(room) if builder.expert_is_in_panels(self._experts) else None)
            if places is None:
                return builder.expert(prefix, self._experts, PanelMemory(room))
            before, (first, offsets) = self._landed.get(slot), places
            if before is not None and before.offsets == offsets:
                return before.followed_by(first)
            expert = builder.expert(prefix, self._experts, PanelMemory(room))
            if isinstance(expert.gate_up, PanelLinear) and isinstance(expert.down, PanelLinear):
                self._landed[slot] = _Landed(first, offsets, expert.gate_up, expert.down)
            return expert
        except CheckpointError as error:
            raise type(error)(
                f"expert {number} of layer {layer} could not be read: {error.message}", hint=error.hint
            ) from error

    def _room(self, slot: int) -> torch.Tensor:
        """Of all slots, which take memory as they are filled: a build without weights fills none."""
        with self._lock:
            if not len(self._memory):
                self._memory = PanelMemory().take(self._slots, torch.uint8)
        return self._memory[slot]

    def _thread(self) -> tuple[ExpertReader, ExpertBuilder]:
        """What this thread reads and builds with."""
        if not hasattr(self._threads, "pair"):
            work_alone()
            reader = self._streaming.open_reader()
            self._threads.pair = reader, self._open_builder(reader.source)
        pair: tuple[ExpertReader, ExpertBuilder] = self._threads.pair
        return pair


@final
class StreamedExperts:
    """An `ExpertTable` whose experts are in memory only as long as there is room, or as they are used."""

    __slots__ = ("_cache", "_first")

    def __init__(self, cache: ExpertCache[DenseMLP], first: int) -> None:
        self._cache, self._first = cache, first

    def groups(
        self, numbers: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Generator[Sequence[tuple[int, DenseMLP]], None, None]:
        """As `ExpertTable.groups`; `meanwhile` is called before any is waited for."""
        with closing(self._cache.lease([self._first + number for number in numbers], meanwhile)) as groups:
            for group in groups:
                yield [(key - self._first, expert) for key, expert in group]

    def read_ahead(self, numbers: Iterable[int], most: int) -> None:
        """Have up to `most` of these read that are not in memory, the likeliest first."""
        self._cache.read_ahead([self._first + number for number in numbers], most)
