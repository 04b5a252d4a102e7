"""The engine: one thread that steps a backend for many requests at once.

Each turn of its loop is three plain calls: admit waiting requests to free KV slots, run some prompt tokens, draw one
token for every running row. Requests join and leave between steps.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ernie45.backends.base import Backend, Batch, MediaBackend, Row, VisionTokens
from ernie45.backends.kv_cache import KVCache
from ernie45.engine.media import MediaEncoder, SequenceMedia
from ernie45.engine.sequence import Sequence
from ernie45.engine.stream import TokenStream
from ernie45.errors import ModelClosedError, UnsupportedError
from ernie45.memory.budget import KVDtype
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.sampling import Drawn, build_sampler, check_finite, greedy_tokens
from ernie45.types.placement import Placement
from ernie45.types.requests import TokenRequest

# A reply's queue holds all its tokens, so that a reader who is slow, or waits for another reply, never holds a slot.
# Events of a scoring request hold a chunk's logits each, so there it is the row that waits for the reader.
_SCORING_CAPACITY = 2


class Engine:
    """Runs token requests on `backend` with `num_slots` KV slots of `context_tokens` each.

    `num_token_ids` is the tokenizer's size: ids from there on can never be drawn. `placement` is the one the backend
    was built with, None for all on its device: KV slots lie with the layers, and tokens are drawn where the head is.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        num_slots: int,
        context_tokens: int,
        num_token_ids: int,
        kv_dtype: KVDtype = "auto",
        placement: Placement | None = None,
    ) -> None:
        placement = placement or Placement.on(str(backend.device), backend.spec.num_layers)
        self._backend = backend
        self._num_token_ids = num_token_ids
        self._vocab_size = backend.spec.vocab_size
        self._device = backend.device
        self._logits_device = torch.device(placement.head)
        self._encoder = MediaEncoder(backend) if isinstance(backend, MediaBackend) else None
        self._merge_size = backend.spec.vision.spatial_merge_size if self._encoder and backend.spec.vision else None
        self._cache = KVCache.allocate(
            backend.spec,
            num_slots=num_slots,
            context_tokens=context_tokens,
            dtype=backend.dtype,
            kv_dtype=kv_dtype,
            placement=placement,
        )
        self._free_slots = list(reversed(range(num_slots)))
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
        self._changed = threading.Condition()
        self._closed = False
        self._woken = False
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._run, name="ernie45-engine", daemon=True)
        self._thread.start()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def submit(self, request: TokenRequest) -> TokenStream:
        """Queue a request.

        Raises ModelClosedError after close(), UnsupportedError in a forked child or for media a model cannot see.
        """
        self._check_process()
        capacity = request.max_new_tokens if request.logit_positions is None else _SCORING_CAPACITY
        stream = TokenStream(capacity=capacity, wake_producer=self._wake)
        sampler = build_sampler(
            request.sampling,
            num_token_ids=self._num_token_ids,
            vocab_size=self._vocab_size,
            prompt_ids=request.token_ids,
            device=self._logits_device,
        )
        sequence = Sequence(request, stream, sampler, self._media_of(request))
        with self._changed:
            if self._closed:
                raise _closed_error()
            self._waiting.append(sequence)
            self._changed.notify()
        return stream

    def close(self) -> None:
        """End every request with ModelClosedError, stop the thread and let go of the weights. Safe to repeat."""
        if os.getpid() != self._process_id:
            return  # a forked child has neither the thread nor, perhaps, a free lock
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _media_of(self, request: TokenRequest) -> SequenceMedia | None:
        if not request.media:
            return None
        if self._merge_size is None:
            raise UnsupportedError(
                f"the request has {len(request.media)} pictures or clips, and this model reads text only",
                hint="load a vision-language model, such as ERNIE-4.5-VL-28B-A3B-PT",
            )
        return SequenceMedia(
            request.media,
            num_prompt_tokens=len(request.token_ids),
            merge_size=self._merge_size,
        )

    def _check_process(self) -> None:
        if os.getpid() != self._process_id:
            raise UnsupportedError(
                "a model does not survive fork(): its engine thread is in the parent process",
                hint="load the model in the child process, or start children with multiprocessing's 'spawn'",
            )

    def _wake(self) -> None:
        """A reader cancelled or made room."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        failure: BaseException = _closed_error()
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._drop_cancelled()
                    self._admit()
                    self._prefill()
                    self._decode()
        except BaseException as bug:  # no reader may wait for a thread that is gone
            failure = bug
            raise
        finally:
            with self._changed:
                self._closed = True
                unfinished = [*self._active, *self._waiting]
            for sequence in unfinished:
                sequence.fail(failure)
            self._active.clear()
            self._waiting.clear()
            del self._backend, self._cache, self._encoder

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        if self._woken or (self._waiting and self._free_slots):
            return True
        return any(sequence.stream.has_room for sequence in self._active)

    def _drop_cancelled(self) -> None:
        with self._changed:
            if not self._woken:
                return
            self._woken = False
            dropped = [s for s in self._waiting if s.stream.cancelled]
            self._waiting = deque(s for s in self._waiting if not s.stream.cancelled)
        for sequence in dropped:
            sequence.cancel()
        for sequence in [s for s in self._active if s.stream.cancelled]:
            sequence.cancel()
            self._release(sequence)

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and self._free_slots:
                sequence = self._waiting.popleft()
                sequence.slot = self._free_slots.pop()
                self._active.append(sequence)

    def _prefill(self) -> None:
        """Run prompt chunks, oldest request first, until this turn's share of prompt tokens is used up.

        One picture, or one part of a clip, is encoded a turn: prompts without do not wait for those with media.
        """
        budget = PREFILL_CHUNK_TOKENS
        encoded = False
        for sequence in [s for s in self._active if s.in_prefill and s.stream.has_room]:
            if sequence.media is not None and not sequence.media.encoded:
                if encoded:
                    continue
                encoded = self._encode_media(sequence)
                if encoded:
                    continue
            while budget > 0 and sequence.in_prefill and sequence.stream.has_room:
                edge = (sequence.num_cached // PREFILL_CHUNK_TOKENS + 1) * PREFILL_CHUNK_TOKENS
                end = min(edge, sequence.num_prompt_tokens)
                budget -= end - sequence.num_cached
                with self._guard([sequence]):
                    self._prefill_chunk(sequence, end)
            if budget <= 0:
                return

    def _encode_media(self, sequence: Sequence) -> bool:
        """Fetch the features of its pictures; whether some were computed, which is a whole turn's work."""
        if sequence.media is None or self._encoder is None:
            return False
        computed = False
        while not (computed or sequence.media.encoded or sequence.finish_reason):
            with self._guard([sequence]):
                computed = sequence.media.encode(self._encoder)
        return computed

    def _prefill_chunk(self, sequence: Sequence, end: int) -> None:
        start = sequence.num_cached
        if sequence.request.logit_positions is not None:
            wanted = [p - start for p in sequence.request.logit_positions if start <= p < end]
        else:
            wanted = [end - 1 - start] if end == sequence.num_prompt_tokens else []
        logits = self._forward([(sequence, end - start)], wanted)
        if not sequence.in_prefill:
            sequence.end_prefill()
        if sequence.is_scoring:
            sequence.score(logits)
        elif not sequence.in_prefill:
            sequence.advance(logits[0])

    def _decode(self) -> None:
        """One token for every running row whose reader keeps up."""
        rows = [s for s in self._active if not s.in_prefill and s.stream.has_room]
        if rows:
            with self._guard(rows):
                self._decode_rows(rows)

    def _decode_rows(self, rows: list[Sequence]) -> None:
        logits = self._forward([(sequence, 1) for sequence in rows], list(range(len(rows))))
        if all(sequence.is_plain_greedy for sequence in rows):
            # One pass over all rows: half the time of one after the other.
            for sequence, best in zip(rows, greedy_tokens(logits, self._num_token_ids), strict=True):
                with self._guard([sequence]):
                    check_finite(best.logit)
                    sequence.accept(Drawn(token_id=best.token_id))
            return
        for sequence, row in zip(rows, logits, strict=True):
            with self._guard([sequence]):
                sequence.advance(row)

    def _forward(self, parts: list[tuple[Sequence, int]], wanted: list[int]) -> Tensor:
        """Run each sequence's next `count` tokens in one batch -> logits [len(wanted), V]."""
        rows: list[Row] = []
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, count in parts:
            assert sequence.slot is not None
            start = sequence.num_cached
            rows.append(Row(slot=sequence.slot, start=start, num_tokens=count))
            token_ids += sequence.token_ids[start : start + count]
            positions += range(start, start + count)
            slots += [sequence.slot] * count
        step = self._backend.forward(
            Batch(
                rows=tuple(rows),
                token_ids=self._ids(token_ids),
                positions=self._ids(positions),
                slots=self._ids(slots),
                wanted=self._ids(wanted),
                cache=self._cache,
                rotary_positions=self._rotary_positions(parts),
                vision=self._vision_tokens(parts),
            )
        )
        for sequence, count in parts:
            sequence.num_cached += count
        return step.logits

    def _rotary_positions(self, parts: list[tuple[Sequence, int]]) -> Tensor | None:
        if all(sequence.media is None for sequence, _ in parts):
            return None
        runs = []
        for sequence, count in parts:
            start, end = sequence.num_cached, sequence.num_cached + count
            if sequence.media is None:
                runs.append(torch.arange(start, end)[:, None].expand(-1, 3))
            else:
                runs.append(sequence.media.positions(start, end))
        return torch.cat(runs).to(self._device)

    def _vision_tokens(self, parts: list[tuple[Sequence, int]]) -> VisionTokens | None:
        """Only prompts have pictures, and a prompt runs by itself; generated tokens are text."""
        sequence, count = parts[0]
        if sequence.media is None or not sequence.in_prefill:
            return None
        return sequence.media.tokens(sequence.num_cached, sequence.num_cached + count, self._device)

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    @contextmanager
    def _guard(self, sequences: list[Sequence]) -> Iterator[None]:
        """What goes wrong inside ends these sequences, not the engine. Finished ones give their slots back."""
        try:
            yield
        except Exception as failure:  # not swallowed: the reader raises it
            for sequence in sequences:
                sequence.fail(failure)
        for sequence in sequences:
            if sequence.finish_reason is not None:
                self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None
            self._active.remove(sequence)


def _closed_error() -> ModelClosedError:
    return ModelClosedError("the model was closed", hint="load it again with ErnieModel.from_pretrained(...)")
