"""The seam between the engine and a model: `Backend.forward(batch) -> Step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ernie45.backends.kv_cache import KVCache
from ernie45.checkpoint.expert_reads import ExpertReader
from ernie45.experts.trace import RoutingLog
from ernie45.memory.streaming import StreamedBank
from ernie45.presets import PRESETS, QuantPreset, WeightPart
from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement
from ernie45.types.stats import ExpertCounts
from ernie45.types.streaming import ExpertSlots


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A run of `num_tokens` new tokens of one sequence, at positions `start` …, whose earlier keys lie in `slot`."""

    slot: int
    start: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's work: the rows' tokens one after the other.

    `token_ids`, `positions` and `slots` are int64 [N], one entry a token. `wanted` [M] says at which of the N tokens
    logits are needed. `rotary_positions` int64 [N, 3] (time, height, width) are what the rotary embedding turns by,
    None where that is `positions`; `vision` is None where all tokens are text. `wants_hidden` asks for hidden states,
    `in_pieces` for logits a few rows at a time, since M may be the length of a chunk.
    """

    rows: tuple[Row, ...]
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor
    cache: KVCache
    rotary_positions: Tensor | None = None
    vision: VisionTokens | None = None
    wants_hidden: bool = False
    in_pieces: bool = False

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on `device`; itself where they lie there. The cache stays where it is."""
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            wanted=self.wanted.to(device),
            rotary_positions=None if self.rotary_positions is None else self.rotary_positions.to(device),
            vision=None if self.vision is None else self.vision.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTokens:
    """Which of a batch's tokens belong to pictures or clips.

    `text` and `routed` int64 say at which of the N tokens the text's and the pictures' experts work; start and end
    markers are with the pictures. `embedded` [F] are the places of placeholders, which `features` [F, h] embed.
    """

    text: Tensor
    routed: Tensor
    embedded: Tensor
    features: Tensor

    def to(self, device: torch.device) -> VisionTokens:
        """The same on `device`."""
        return VisionTokens(
            text=self.text.to(device),
            routed=self.routed.to(device),
            embedded=self.embedded.to(device),
            features=self.features.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step gives: `logits` float32 [M, V], one row for each wanted token, and `hidden` [N, h], the hidden states
    of all tokens before the final norm, where the batch wants them. Where it asks for logits in pieces, there may be
    fewer rows in `logits`; the others are computed as `pieces` is iterated, [n, V] at a time, in the place of those
    before."""

    logits: Tensor
    hidden: Tensor | None = None
    pieces: Iterable[Tensor] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Streaming:
    """How routed experts are read while the model runs: how many of each bank lie in memory, what one takes there, and
    a reader for each thread that reads."""

    slots: ExpertSlots
    banks: tuple[StreamedBank, ...]
    open_reader: Callable[[], ExpertReader]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How a backend is to be built: the dtype of its arithmetic and of what `preset` does not cover, where its parts
    lie, the longest sequence in tokens, and whether the head for multi-token prediction is built as well. With
    `streaming` routed experts are read while the model runs."""

    dtype: torch.dtype
    placement: Placement
    preset: QuantPreset
    context_tokens: int
    mtp: bool = False
    streaming: Streaming | None = None

    @staticmethod
    def unquantised(spec: ModelSpec, *, dtype: torch.dtype, device: str, context_tokens: int = 1) -> BuildOptions:
        """Everything in `dtype` on one device; "meta" for a build without weights."""
        placement = Placement.on(device, spec.num_layers)
        return BuildOptions(dtype=dtype, placement=placement, preset=PRESETS["none"], context_tokens=context_tokens)


class Backend(Protocol):
    """A model's weights and its forward step. The engine calls it from one thread only."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def weight_bytes(self) -> Mapping[WeightPart, int]:
        """Bytes of the weights it holds, by part."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def forward(self, batch: Batch) -> Step: ...


@runtime_checkable
class PrefixBackend(Backend, Protocol):
    """A backend that says how its keys and values depend on the tokens run with them, so that prompts which begin alike
    may take them over. Without that, every prompt is computed from its beginning."""

    @property
    def prefix_tokens(self) -> int:
        """1 where a token's bits are the same however tokens are grouped into steps: any prefix can be taken over,
        generated tokens included. Else prefixes end at multiples of this, and hold nothing but prompt tokens."""
        ...


@runtime_checkable
class StreamingBackend(Backend, Protocol):
    """A backend whose routed experts may be read from the checkpoint while it runs."""

    @property
    def expert_caches(self) -> Sequence[ExpertCounter]:
        """Those that lie in memory, by the bank they are of; none where all do."""
        ...


@runtime_checkable
class RoutingBackend(Backend, Protocol):
    """A backend that says which experts its routers choose."""

    @property
    def routing(self) -> RoutingLog | None:
        """Where it says so; None where there are no routed experts."""
        ...


class ExpertCounter(Protocol):
    """`ernie45.experts.cache.ExpertCache`."""

    @property
    def counts(self) -> ExpertCounts: ...

    def close(self) -> None: ...


@runtime_checkable
class MediaBackend(Backend, Protocol):
    """A backend that sees: its `spec.vision` is not None."""

    def encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [P, values] of a picture, or of some frames of a clip (an even number), as `Media` holds them, with
        their frames, rows and columns -> features [tokens, h], on the backend's device and in its dtype."""
        ...
