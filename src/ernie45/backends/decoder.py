"""The text decoder: pre-norm blocks of causal attention and an MLP, dense or of experts, as one readable file.

Shape letters: N tokens of this step, h hidden size, H query heads, Hkv key/value heads, D head width, I MLP width,
E experts, K experts chosen for a token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from ernie45.backends.base import Batch, Step, VisionTokens
from ernie45.experts.cache import ExpertCache
from ernie45.experts.trace import BankLog, RoutingLog
from ernie45.kernels.linear import Embedding, Linear
from ernie45.kernels.ops import RotaryTable, attention, rms_norm, rotate, route, swiglu
from ernie45.memory.workspace import SCORED_ROWS
from ernie45.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """`qkv` is the query, key and value projections in one matrix [(H + 2·Hkv)·D, h]."""

    qkv: Linear
    out: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer: int) -> Tensor:
        return self.out(self.attend(*self.project(x, cos, sin), batch, layer))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, h] -> query [N, H, D] and key [N, Hkv, D], both rotated, and value [N, Hkv, D]"""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        query, key = rotate(heads[:, :num_rotated], cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        return query, key, heads[:, num_rotated:]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, layer: int) -> Tensor:
        """Put keys and values into the batch's KV slots -> what each token finds among those of its sequence
        [N, H·D]"""
        batch.cache.write(layer, batch.slots, batch.positions, key, value)
        seen = []
        first = 0
        for row in batch.rows:
            end = row.start + row.num_tokens
            new = query[first : first + row.num_tokens]
            seen.append(attention(new, *batch.cache.read(layer, row.slot, end)))
            first += row.num_tokens
        return seen[0] if len(seen) == 1 else torch.cat(seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMLP:
    """SwiGLU; `gate_up` is the gate and up projections in one matrix [2·I, h], gate first."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """Chooses experts in float32: `weight` [E, h], and `correction` [1, E], which only moves the choice."""

    weight: Tensor
    correction: Tensor | None
    experts_per_token: int
    norm_min: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, h] -> expert numbers int64 [N, K] and their shares float32 [N, K]"""
        return route(x, self.weight, self.correction, self.experts_per_token, self.norm_min)


class ExpertTable(Protocol):
    """The experts of a bank, by their numbers."""

    def groups(self, numbers: Sequence[int]) -> Generator[Sequence[tuple[int, DenseMLP]], None, None]:
        """The experts of these numbers, as they arrive, in groups: those of one are in memory until the next."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidentExperts:
    """All experts of a bank are in memory."""

    experts: tuple[DenseMLP, ...]

    def groups(self, numbers: Sequence[int]) -> Generator[Sequence[tuple[int, DenseMLP]], None, None]:
        """All at once."""
        yield [(number, self.experts[number]) for number in numbers]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBank:
    """Each token goes through the K of E `experts` its router chose.

    Only experts that some token chose are asked of the table. They lie on `device`; where that is not the router's,
    rows go there and come back as a sum. The `log` is told what was chosen.
    """

    router: Router
    experts: ExpertTable
    device: torch.device
    log: BankLog

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [N, h] on the router's device -> [N, h], there as well"""
        x, chosen, shares = (tensor.to(self.device) for tensor in (rows, *self.router(rows)))
        if self.log.is_recording:
            self.log.record(chosen.numpy(force=True))
        # Summed in float32 and always in the order of the experts: a row's bits do not depend on the others.
        routed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        hits = _hits(chosen)
        turns, early = iter(hits), dict[int, Tensor]()
        turn = next(turns, -1)
        with closing(self.experts.groups(list(hits))) as groups:
            for number, expert in chain.from_iterable(groups):
                tokens, places = hits[number]
                early[number] = expert(x[tokens]) * shares[tokens, places, None]
                while turn in early:
                    routed.index_add_(0, hits[turn][0], early.pop(turn))
                    turn = next(turns, -1)
        return routed.to(x.dtype).to(rows.device)


def _hits(chosen: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """chosen [N, K] -> of every expert in it, in order: its tokens and at which of the K places."""
    experts, order = chosen.flatten().sort(stable=True)
    numbers, counts = experts.unique_consecutive(return_counts=True)
    split = order.split(counts.tolist())
    return {
        number: (places // chosen.shape[1], places % chosen.shape[1])
        for number, places in zip(numbers.tolist(), split, strict=True)
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMLP:
    """Text tokens go through the `text` bank of experts, those of pictures through `vision`, and all of them through
    the `shared` MLP where there is one."""

    text: ExpertBank
    vision: ExpertBank | None
    shared: DenseMLP | None

    def __call__(self, x: Tensor, tokens: VisionTokens | None) -> Tensor:
        out = self.routed(x, tokens)
        return out if self.shared is None else out + self.shared(x)

    def routed(self, x: Tensor, tokens: VisionTokens | None) -> Tensor:
        """x [N, h] through the experts that were chosen, without the shared MLP -> [N, h]"""
        if tokens is None:
            return self.text(x)
        assert self.vision is not None
        out = torch.empty_like(x)
        for bank, rows in ((self.text, tokens.text), (self.vision, tokens.routed)):
            if len(rows):
                out[rows] = bank(x[rows])
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: DenseMLP | ExpertMLP

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, batch, layer)
        normed = self.mlp_norm(x)
        return x + (self.mlp(normed) if isinstance(self.mlp, DenseMLP) else self.mlp(normed, batch.vision))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Layers that follow one another on one device, from number `first` on."""

    device: torch.device
    first: int
    layers: tuple[DecoderLayer, ...]
    rotary: RotaryTable

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [N, h] through the layers; both lie on the device."""
        cos, sin = self.angles(batch)
        for index, layer in enumerate(self.layers, self.first):
            x = layer(x, cos, sin, batch, index)
        return x

    def angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin [N, 1, D/2] of the angles that the batch's tokens are rotated by."""
        return self.rotary.at(batch.positions if batch.rotary_positions is None else batch.rotary_positions)


class Layers(Protocol):
    """A `Stage`, or what stands for one: its layers by other means."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, x: Tensor, batch: Batch) -> Tensor: ...


class Head(Protocol):
    """The final norm and the output head [V, h]."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [M, h] -> float32 logits [M, V], in `out` where that is given"""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NormedHead:
    norm: Norm
    linear: Linear

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        logits = self.linear(self.norm(x))
        return logits.float() if out is None else out.copy_(logits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The whole trunk: embedding [V, h], layers, and the head with the final norm on `head_device`. `expert_caches`
    hold the routed experts that are read as they are chosen, and `routing` is where layers say which those are."""

    spec: ModelSpec
    embedding: Embedding
    stages: tuple[Layers, ...]
    head: Head
    head_device: torch.device
    expert_caches: tuple[ExpertCache[DenseMLP], ...] = ()
    routing: RoutingLog | None = None

    def __call__(self, batch: Batch) -> Step:
        """Run the batch, whose tensors lie with the embedding, through every layer, filling its KV slots. The
        logits lie on the head's device, hidden states with the last layer."""
        x = self.embedding.lookup(batch.token_ids)
        if batch.vision is not None:
            x[batch.vision.embedded] = batch.vision.features
        with nullcontext() if self.routing is None else self.routing.step():
            for stage in self.stages:
                batch = batch.to(stage.device)
                x = stage(x.to(stage.device), batch)
        hidden = x if batch.wants_hidden else None
        if batch.in_pieces or not len(batch.wanted):
            logits = torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=self.head_device)
            return Step(logits=logits, hidden=hidden, pieces=self._pieces(x, batch.wanted))
        return Step(logits=self.head(x[batch.wanted].to(self.head_device)), hidden=hidden)

    def _pieces(self, x: Tensor, wanted: Tensor) -> Iterator[Tensor]:
        """Logits of a few rows at a time, each in the place of the one before: megabytes that the heap would else be
        asked for again and again, and would keep more of than are ever in use."""
        place = torch.empty((min(len(wanted), SCORED_ROWS), self.spec.vocab_size), device=self.head_device)
        for rows in wanted.split(SCORED_ROWS):
            if len(rows):
                yield self.head(x[rows].to(self.head_device), out=place[: len(rows)])
