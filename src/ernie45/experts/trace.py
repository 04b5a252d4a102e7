"""What the routers of a model chose while it ran: recorded, counted, saved, and replayed against a cache."""

from __future__ import annotations

import threading
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from ernie45.errors import InvalidRequestError
from ernie45.experts.heat_map import draw_shares
from ernie45.experts.policy import SimulatedCache, UsePolicy

Bank = Literal["text", "vision"]

MAX_TOKENS: Final = 200_000
"""Tokens that are recorded at most: of 300B-A47B 82 MB where they come as prompts, 0.3 GB one at a time."""

_Call = tuple[int, int, NDArray[np.unsignedinteger]]
"""A layer, the number of a bank, and the experts [N, K] that it chose."""

_BANKS: Final[tuple[Bank, ...]] = ("text", "vision")
_ARRAYS: Final = ("num_experts", "missed_tokens", "calls", "chosen")
_DECODING_TOKENS: Final = 16  # prompts come in chunks of up to 512


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingTrace:
    """The experts that were chosen for each token, in the order in which layers ran.

    `calls` int32 [calls, 3] has for every layer of every step: the layer, the bank (0 for text, 1 for vision) and how
    many tokens went through it. `chosen` uint8 or uint16 [tokens of all calls, K] are their experts, of `num_experts`
    (E) in a bank. `missed_tokens` came after the recording was full.
    """

    num_experts: int
    calls: NDArray[np.int32]
    chosen: NDArray[np.unsignedinteger]
    missed_tokens: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers with routed experts."""
        return tuple(np.unique(self.calls[:, 0]).tolist())

    def num_tokens(self, bank: Bank = "text") -> int:
        """How many tokens went through this bank of every layer."""
        mine = self.calls[self.calls[:, 1] == _number(bank)]
        return int(np.bincount(mine[:, 0], weights=mine[:, 2]).max(initial=0))

    def experts(self, layer: int, bank: Bank = "text") -> NDArray[np.unsignedinteger]:
        """Of every token in order, the experts that the layer chose [tokens, K]."""
        mine = (self.calls[:, 0] == layer) & (self.calls[:, 1] == _number(bank))
        chosen: NDArray[np.unsignedinteger] = self.chosen[np.repeat(mine, self.calls[:, 2])]
        return chosen

    def counts(self, bank: Bank = "text") -> NDArray[np.int64]:
        """How many tokens chose each expert [layers, E], in the order of `layers`."""
        rows = [np.bincount(self.experts(layer, bank).ravel(), minlength=self.num_experts) for layer in self.layers]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_experts)

    def replay(self, slots: int, bank: Bank = "text") -> float:
        """The share of experts that decoding would have found in memory, were `slots` of them held over all layers.

        A step of up to 16 tokens counts as decoding, and an expert that several of them chose as one. What larger
        steps of prompts use goes through the cache too, but is not counted.

        Raises:
            InvalidRequestError: fewer slots than one token chooses experts in a layer, or no step to count.
        """
        if slots < self.chosen.shape[1]:
            raise InvalidRequestError(
                f"a cache of {slots} experts, where a token chooses {self.chosen.shape[1]} in a layer",
                hint="replay with more slots",
            )
        num_keys = len(self.layers) * self.num_experts
        cache = SimulatedCache(UsePolicy(num_keys), num_keys, slots)
        hits = uses = 0
        for keys, num_tokens in self.uses(bank):
            found = sum(cache.use(keys[first : first + slots]) for first in range(0, len(keys), slots))
            if num_tokens <= _DECODING_TOKENS:
                hits += found
                uses += len(keys)
        if not uses:
            raise InvalidRequestError(
                f"the trace has no step of {bank} tokens that decodes", hint="record while the model replies"
            )
        return hits / uses

    def uses(self, bank: Bank = "text") -> Iterator[tuple[NDArray[np.int64], int]]:
        """Of every call of the bank: the keys of its experts, 0 … layers · E - 1, each once, and how many
        tokens it had."""
        first_keys = {layer: index * self.num_experts for index, layer in enumerate(self.layers)}
        ends = np.cumsum(self.calls[:, 2])
        for (layer, of_bank, num_tokens), end in zip(self.calls.tolist(), ends.tolist(), strict=True):
            if of_bank == _number(bank):
                yield first_keys[layer] + np.unique(self.chosen[end - num_tokens : end]).astype(np.int64), num_tokens

    def heat_map(self, bank: Bank = "text") -> str:
        """Layers x experts as an SVG picture: which share of the tokens chose each expert."""
        num_tokens = self.num_tokens(bank)
        shares = self.counts(bank) / max(num_tokens, 1)
        title = f"Experts chosen for {num_tokens:,} tokens" + (" of pictures" if bank == "vision" else "")
        return draw_shares(title, self.layers, shares, even=self.chosen.shape[1] / self.num_experts)

    def save(self, path: str | Path) -> None:
        """Write the trace to a compressed .npz file of this very name.

        Raises:
            InvalidRequestError: the file cannot be written.
        """
        try:
            with Path(path).open("wb") as file:
                np.savez_compressed(
                    file,
                    num_experts=self.num_experts,
                    missed_tokens=self.missed_tokens,
                    calls=self.calls,
                    chosen=self.chosen,
                )
        except OSError as error:
            raise InvalidRequestError(f"{path} cannot be written: {error}", hint="name another file") from error

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what `save` wrote. Nothing in the file is run.

        Raises:
            InvalidRequestError: there is no such file, or it holds no trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
        except FileNotFoundError as error:
            raise InvalidRequestError(
                f"there is no file {path}", hint="name one that RoutingTrace.save wrote"
            ) from error
        except (
            OSError,
            EOFError,
            KeyError,
            AttributeError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise _no_trace(path, str(error)) from error
        return _checked(path, **arrays)

    def __repr__(self) -> str:
        pictures = f" and {num_tokens:,} of pictures" if (num_tokens := self.num_tokens("vision")) else ""
        missed = f"; {self.missed_tokens:,} more came when it was full" if self.missed_tokens else ""
        experts = f"{self.chosen.shape[1]} of {self.num_experts} experts in {len(self.layers)} layers"
        return f"<RoutingTrace of {self.num_tokens():,} text tokens{pictures}: {experts}{missed}>"

    def _repr_svg_(self) -> str:
        return self.heat_map()


@final
class RoutingLog:
    """Where the layers of a model, with `num_experts` in a bank, say what their routers chose. It is kept only while
    somebody records."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._recording: Recording | None = None
        self._lock = threading.Lock()
        self._step: list[_Call] | None = None

    @property
    def is_recording(self) -> bool:
        """Whether the step that runs now is kept."""
        return self._step is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step of the model, which is kept if a recording has all of it: layers have the same tokens in a trace."""
        recording = self._recording
        if recording is None:
            yield
            return
        self._step = []
        try:
            yield
            with self._lock:
                if self._recording is recording and self._step:
                    recording.add(self._step)
        finally:
            self._step = None

    def record(self, layer: int, chosen: NDArray[np.integer], bank: Bank = "text") -> None:
        """A layer has chosen these experts [N, K] for the N tokens of a step."""
        if self._step is not None:
            self._step.append((layer, _number(bank), chosen.astype(self._dtype)))

    @contextmanager
    def recording(self, max_tokens: int = MAX_TOKENS) -> Iterator[Recording]:
        """Record the steps that run during the block, of any thread, until `max_tokens` went through every layer.

        Raises:
            InvalidRequestError: somebody records already, or `max_tokens` is no positive number.
        """
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens must be a positive number, not {max_tokens!r}", hint=f"the default is {MAX_TOKENS:,}"
            )
        recording = Recording(self._num_experts, max_tokens)
        with self._lock:
            if self._recording is not None:
                raise InvalidRequestError(
                    "the routing of this model is being recorded already", hint="end the other recording before"
                )
            self._recording = recording
        try:
            yield recording
        finally:
            with self._lock:
                self._recording = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BankLog:
    """The part of a log that is about one bank of one layer."""

    log: RoutingLog
    layer: int
    bank: Bank

    @property
    def is_recording(self) -> bool:
        """As `RoutingLog.is_recording`: without that there is no need to `record`."""
        return self.log.is_recording

    def record(self, chosen: NDArray[np.integer]) -> None:
        """As `RoutingLog.record`."""
        self.log.record(self.layer, chosen, self.bank)


@final
class Recording:
    """What has been recorded so far is its `trace`."""

    def __init__(self, num_experts: int, max_tokens: int) -> None:
        self._num_experts, self._max_tokens = num_experts, max_tokens
        self._steps: list[tuple[NDArray[np.int32], NDArray[np.unsignedinteger]]] = []
        self._num_tokens = self._missed_tokens = 0

    def add(self, step: Sequence[_Call]) -> None:
        """What the layers chose in a step, all of them for the same tokens."""
        num_tokens = sum(len(chosen) for layer, _, chosen in step if layer == step[0][0])
        if self._missed_tokens or self._num_tokens + num_tokens > self._max_tokens:
            # Once a step is missed so are all after it: a trace has no holes.
            self._missed_tokens += num_tokens
            return
        self._num_tokens += num_tokens
        calls = np.array([(layer, bank, len(chosen)) for layer, bank, chosen in step], dtype=np.int32)
        self._steps.append((calls, np.concatenate([chosen for _, _, chosen in step])))

    @property
    def trace(self) -> RoutingTrace:
        """Of all steps until now."""
        steps = list(self._steps)
        return RoutingTrace(
            num_experts=self._num_experts,
            calls=np.concatenate([calls for calls, _ in steps] or [np.empty((0, 3), np.int32)]),
            chosen=np.concatenate([chosen for _, chosen in steps] or [np.empty((0, 0), np.uint8)]),
            missed_tokens=self._missed_tokens,
        )


def _number(bank: Bank) -> int:
    if bank not in _BANKS:
        raise InvalidRequestError(f"there is no bank of experts {bank!r}", hint='say "text" or "vision"')
    return _BANKS.index(bank)


def _checked(
    path: str | Path, num_experts: NDArray[Any], missed_tokens: NDArray[Any], calls: NDArray[Any], chosen: NDArray[Any]
) -> RoutingTrace:
    """The trace of a file's arrays, if these fit together."""
    if any(array.dtype.kind not in "iu" for array in (num_experts, missed_tokens, calls, chosen)):
        raise _no_trace(path, "what should be whole numbers is not")
    if num_experts.ndim or missed_tokens.ndim or calls.ndim != 2 or calls.shape[1] != 3 or chosen.ndim != 2:
        raise _no_trace(path, "an array has another shape")
    if calls.min(initial=0) < 0 or calls[:, 1].max(initial=0) >= len(_BANKS) or calls[:, 2].sum() != len(chosen):
        raise _no_trace(path, f"its calls are not those of {len(chosen):,} tokens")
    if chosen.min(initial=0) < 0 or chosen.max(initial=0) >= num_experts:
        raise _no_trace(path, f"it names experts beyond the {num_experts} that it says there are")
    return RoutingTrace(num_experts=int(num_experts), calls=calls, chosen=chosen, missed_tokens=int(missed_tokens))


def _no_trace(path: str | Path, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} holds no routing trace: {why}", hint="name a file that RoutingTrace.save wrote")
