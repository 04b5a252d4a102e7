"""Backends whose answers depend on everything that lies in a sequence's slot, and what tests do with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ernie45.backends.base import Batch, Row, Step
from ernie45.engine.engine import Engine
from ernie45.presets import WeightPart
from ernie45.runners.base import Handle
from ernie45.spec import ModelSpec
from ernie45.types.requests import TokenRequest
from ernie45.types.results import TokenEvent
from tests.engine.test_engine import VOCAB_SIZE, CountingBackend, next_event

NUM_IDS = 40


class CacheReadingBackend:
    """Writes down in the KV cache what each token is and where it stands, and draws the next one from all of that: a
    wrong key anywhere before it gives another reply. `steps` has each step's rows; `before_step` maps numbers of steps
    to what is done just before them."""

    def __init__(self, prefix_tokens: int, spec: ModelSpec | None = None) -> None:
        self.spec: ModelSpec = spec or CountingBackend().spec
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self.weight_bytes: Mapping[WeightPart, int] = {}
        self.prefix_tokens = prefix_tokens
        self.steps: list[tuple[Row, ...]] = []
        self.may_run = threading.Event()
        self.may_run.set()
        self.before_step: dict[int, Callable[[], None]] = {}

    @property
    def num_run(self) -> int:
        """Tokens run so far, those of prompts and those of replies."""
        return sum(row.num_tokens for rows in self.steps for row in rows)

    def forward(self, batch: Batch) -> Step:
        assert self.may_run.wait(10)
        self.before_step.pop(len(self.steps), lambda: None)()
        self.steps.append(batch.rows)
        self._write(batch)
        ends = torch.cat([torch.arange(row.start, row.start + row.num_tokens) + 1 for row in batch.rows]).tolist()
        following = [
            _mixed(*batch.cache.read(0, int(batch.slots[place]), ends[place])) for place in batch.wanted.tolist()
        ]
        ids = torch.tensor(following, dtype=torch.int64)
        return Step(logits=torch.nn.functional.one_hot(ids, VOCAB_SIZE).float())

    def _write(self, batch: Batch) -> None:
        keys = torch.zeros(len(batch.token_ids), 1, self.spec.head_dim)
        values = torch.zeros_like(keys)
        keys[:, 0, 0] = batch.token_ids.float()
        values[:, 0, 0] = batch.positions.float()
        if batch.rotary_positions is not None:
            values[:, 0, :3] = batch.rotary_positions.float()
        if batch.vision is not None:
            keys[batch.vision.routed, 0, 1] = 1.0
            keys[batch.vision.embedded, 0, 2] = batch.vision.features[:, 0]
        batch.cache.write(0, batch.slots, batch.positions, keys, values)


class SeeingCacheBackend(CacheReadingBackend):
    """One that sees: a picture's features are the colour of its patches. `encoded` has the grids, in order."""

    def __init__(self, prefix_tokens: int, spec: ModelSpec) -> None:
        super().__init__(prefix_tokens, spec)
        self.encoded: list[tuple[int, int, int]] = []

    def encode(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        self.encoded.append(grid)
        num_tokens = len(patches) // 4 // (1 if grid[0] == 1 else 2)
        return patches[:, 0].float().view(num_tokens, -1).amax(1)[:, None].expand(-1, self.spec.hidden_size).clone()


def _mixed(keys: Tensor, values: Tensor) -> int:
    """An id that every number in keys and values [1, S, D] changes."""
    both = torch.cat([keys[0], values[0]], dim=1).to(torch.int64)
    places = torch.arange(1, both.numel() + 1).view(both.shape)
    return int((both * places * places).sum() % 1_000_003 % NUM_IDS)


def reply(engine: Engine, request: TokenRequest) -> tuple[list[int], int]:
    """The ids of a reply, and how many tokens of its prompt were taken over."""
    return read(engine.submit(request))


def read(handle: Handle) -> tuple[list[int], int]:
    events = events_of(handle)
    return [event.token_id for event in events if event.token_id is not None], events[-1].cached_tokens


def events_of(handle: Handle) -> list[TokenEvent]:
    """All of them, up to the last."""
    events = [next_event(handle)]
    while events[-1].finish_reason is None:
        events.append(next_event(handle))
    return events
