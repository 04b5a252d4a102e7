"""The engine: one thread that steps a backend for many requests at once.

Each turn of its loop is three plain calls: admit waiting requests to free KV slots in the order they came, run at most
`PREFILL_CHUNK_TOKENS` prompt tokens, draw a token for every running row, or several where guesses were right. Requests
join and leave between steps. So running rows get a token every turn, and a prompt that is shorter than the others waits
for two turns at most.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ernie45.backends.base import Backend, MediaBackend, PrefixBackend, Step, StreamingBackend
from ernie45.backends.kv_cache import KVCache
from ernie45.engine.media import MediaEncoder, SequenceMedia
from ernie45.engine.schedule import PrefillSchedule
from ernie45.engine.sequence import Sequence, Submission
from ernie45.engine.sequence_batch import Part, sequence_batch
from ernie45.engine.slots import SlotPool
from ernie45.engine.speculation.proposer import Ask
from ernie45.engine.speculation.speculation import Checked, Speculation
from ernie45.engine.stream import TokenStream, check_process
from ernie45.errors import ModelClosedError, UnsupportedError
from ernie45.kernels.native import trim
from ernie45.memory.budget import KVDtype
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.sampling import Best, Drawn, Sampler, build_sampler, check_finite, greedy_tokens
from ernie45.types.placement import Placement
from ernie45.types.requests import Sampling, TokenRequest


class Engine:
    """Runs token requests on `backend` with `num_slots` KV slots of `context_tokens` each.

    `num_token_ids` is the tokenizer's size: ids from there on can never be drawn. `placement` is the one the backend
    was built with, None for all on its device: KV slots lie with the layers, and tokens are drawn where the head is.
    With `prefix_cache` prompts take over what slots hold of them (see `SlotPool`), where the backend is a
    `PrefixBackend`. With `speculation` a step of a running row checks guessed tokens as well.
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
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
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
        prefix_tokens = backend.prefix_tokens if prefix_cache and isinstance(backend, PrefixBackend) else None
        self._slots = SlotPool(self._cache, num_slots=num_slots, prefix_tokens=prefix_tokens)
        self._schedule = PrefillSchedule()
        self._speculation = speculation
        self._waiting: deque[Submission] = deque()
        self._active: list[Sequence] = []
        self._changed = threading.Condition()
        self._closed = False
        self._woken = False
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._run, name="ernie45-engine", daemon=True)
        self._thread.start()

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    def submit(self, request: TokenRequest) -> TokenStream:
        """Queue a request. The queue has no limit, and none is lost: what waits takes little more than its ids.

        Raises ModelClosedError after close(), UnsupportedError in a forked child or for media a model cannot see, and
        InvalidRequestError for options that do not fit the vocabulary.
        """
        check_process(self._process_id)
        self._check_media(request)
        self._build_sampler(request.sampling)  # only to check its options: the one that draws is built with a slot
        # The queue holds all events, so that a reader who is slow, or waits for another reply, never holds a slot.
        stream = TokenStream(capacity=max(1, request.max_new_tokens), wake_producer=self._wake)
        with self._changed:
            if self._closed:
                raise _closed_error()
            self._waiting.append(Submission(request=request, stream=stream))
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

    def _build_sampler(self, sampling: Sampling, prompt_ids: tuple[int, ...] = ()) -> Sampler:
        return build_sampler(
            sampling,
            num_token_ids=self._num_token_ids,
            vocab_size=self._vocab_size,
            prompt_ids=prompt_ids,
            device=self._logits_device,
        )

    def _check_media(self, request: TokenRequest) -> None:
        if request.media and self._merge_size is None:
            raise UnsupportedError(
                f"the request has {len(request.media)} pictures or clips, and this model reads text only",
                hint="load a vision-language model, such as ERNIE-4.5-VL-28B-A3B-PT",
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
                streams = [s.stream for s in self._active] + [s.stream for s in self._waiting]
            for stream in streams:
                stream.fail(failure)
            self._active.clear()
            self._waiting.clear()
            if self._speculation is not None:
                self._speculation.close()
            if isinstance(self._backend, StreamingBackend):
                for cache in self._backend.expert_caches:
                    cache.close()
            del self._backend, self._cache, self._slots, self._encoder, self._speculation
            trim()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_work())
            return not self._closed

    def _has_work(self) -> bool:
        if self._woken or (self._waiting and self._slots.num_free):
            return True
        return any(sequence.stream.has_room for sequence in self._active)

    def _drop_cancelled(self) -> None:
        with self._changed:
            if not self._woken:
                return
            self._woken = False
            dropped = [s for s in self._waiting if s.stream.cancelled]
            self._waiting = deque(s for s in self._waiting if not s.stream.cancelled)
        for submission in dropped:
            submission.cancel()
        for sequence in [s for s in self._active if s.stream.cancelled]:
            sequence.cancel()
            self._release(sequence)

    def _admit(self) -> None:
        while self._waiting and self._slots.num_free:
            self._start(self._waiting[0])
            with self._changed:
                self._waiting.popleft()  # not before: a request is always either waiting or has a slot

    def _start(self, submission: Submission) -> None:
        try:
            sequence = self._sequence(submission)
        except Exception as failure:  # not swallowed: the reader raises it
            submission.stream.fail(failure)
            return
        with self._guard([sequence]):
            self._slots.lend(sequence)
            self._active.append(sequence)

    def _sequence(self, submission: Submission) -> Sequence:
        request, media = submission.request, None
        if request.media and self._merge_size is not None:
            media = SequenceMedia(request.media, num_prompt_tokens=len(request.token_ids), merge_size=self._merge_size)
        return Sequence(submission, self._build_sampler(request.sampling, request.token_ids), media)

    def _prefill(self) -> None:
        """Run prompt chunks in the schedule's order, as many as fit a turn's share of prompt tokens."""
        num_left = PREFILL_CHUNK_TOKENS
        for sequence in self._schedule.order([s for s in self._active if s.in_prefill and s.stream.has_room]):
            if num_left:
                with self._guard([sequence]):
                    num_left = self._prefill_some(sequence, num_left)

    def _prefill_some(self, sequence: Sequence, num_left: int) -> int:
        """Run its next chunks, as many as fit `num_left` tokens, and say how many are left then.

        What other slots have by now is copied. One picture, or one part of a clip, is encoded in a turn of its own, so
        that prompts without do not wait for those with media.
        """
        while sequence.in_prefill and sequence.stream.has_room:
            self._slots.catch_up(sequence)
            if sequence.media is not None and not sequence.media.encoded:
                if num_left < PREFILL_CHUNK_TOKENS:
                    break
                if self._encode_media(sequence.media):
                    return 0
            start = sequence.num_cached
            edge = (start // PREFILL_CHUNK_TOKENS + 1) * PREFILL_CHUNK_TOKENS
            end = min(edge, sequence.num_prompt_tokens)
            if end - start > num_left:
                break
            self._prefill_chunk(sequence, end)
            num_left -= end - start
        return num_left

    def _encode_media(self, media: SequenceMedia) -> bool:
        """Fetch the features of its pictures; whether some were computed, which is a whole turn's work."""
        assert self._encoder is not None
        computed = False
        while not (computed or media.encoded):
            computed = media.encode(self._encoder)
        return computed

    def _prefill_chunk(self, sequence: Sequence, end: int) -> None:
        start = sequence.num_cached
        if sequence.request.logit_positions is not None:
            wanted = [p - start for p in sequence.request.logit_positions if start <= p < end]
        else:
            wanted = [end - 1 - start] if end == sequence.num_prompt_tokens else []
        part = Part(sequence=sequence, token_ids=sequence.token_ids[start:end], wanted=wanted)
        step = self._forward([part], in_pieces=sequence.is_scoring)
        sequence.num_cached = end
        self._observe(sequence, start, step.hidden)
        self._slots.note(sequence)
        if not sequence.in_prefill:
            sequence.end_prefill()
        if sequence.is_scoring:
            sequence.score(chain([step.logits] if len(step.logits) else [], step.pieces))
        elif not sequence.in_prefill:
            sequence.advance(step.logits[0])

    def _decode(self) -> None:
        """One token for every running row whose reader keeps up."""
        rows = [s for s in self._active if not s.in_prefill and s.stream.has_room]
        if rows:
            with self._guard(rows):
                self._decode_rows(rows)

    def _decode_rows(self, rows: list[Sequence]) -> None:
        parts = []
        for sequence, guesses in zip(rows, self._propose(rows), strict=True):
            token_ids = [sequence.token_ids[-1], *guesses]
            parts.append(Part(sequence=sequence, token_ids=token_ids, wanted=range(len(token_ids))))
        started = time.perf_counter()
        step = self._forward(parts)
        best: list[Best] = []
        if all(sequence.is_plain_greedy for sequence in rows):
            # One pass over all rows: half the time of one after the other.
            best = greedy_tokens(step.logits, self._num_token_ids)
        checked, first = [], 0
        for part in parts:
            with self._guard([part.sequence]):
                start = part.sequence.num_cached
                checked.append(self._draw(part, first, step.logits, best))
                if step.hidden is not None:
                    num_kept = part.sequence.num_cached - start
                    self._observe(part.sequence, start, step.hidden[first : first + num_kept])
            first += len(part.token_ids)
        if self._speculation is not None:
            self._speculation.note_step(checked, time.perf_counter() - started)

    def _draw(self, part: Part, first: int, logits: Tensor, best: list[Best]) -> Checked:
        """Draw a token after each that was run, as long as it is the one that was run next; what was run beyond that
        will be overwritten. The part's `logits` begin in row `first`; `best` is the highest of each row where that is
        all that counts, else empty."""
        sequence, guesses = part.sequence, part.token_ids[1:]
        assert sequence.slot is not None
        num_accepted = sequence.num_accepted
        sequence.num_guessed += len(guesses)
        for place, guess in enumerate([*guesses, None], first):
            if best and sequence.is_plain_greedy:
                check_finite(best[place].logit)
                sequence.accept(Drawn(token_id=best[place].token_id), guess)
            else:
                sequence.advance(logits[place], guess)
            if sequence.finish_reason is not None or sequence.token_ids[-1] != guess:
                break
        sequence.num_cached = len(sequence.token_ids) - 1
        return Checked(slot=sequence.slot, num_proposed=len(guesses), num_accepted=sequence.num_accepted - num_accepted)

    def _propose(self, rows: list[Sequence]) -> list[list[int]]:
        """Guesses of what each row goes on with after its last token."""
        if self._speculation is None:
            return [[]] * len(rows)
        asks = []
        for sequence in rows:
            assert sequence.slot is not None
            asks.append(
                Ask(
                    slot=sequence.slot,
                    token_ids=sequence.token_ids,
                    most=sequence.max_guesses,
                    sampler=sequence.sampler,
                )
            )
        return self._speculation.propose(asks)

    def _observe(self, sequence: Sequence, start: int, hidden: Tensor | None) -> None:
        """Show the proposer the states of tokens at positions `start` … that stay."""
        if self._speculation is not None and hidden is not None and not sequence.is_scoring:
            assert sequence.slot is not None
            self._speculation.observe(sequence.slot, sequence.token_ids, start, hidden)

    def _forward(self, parts: list[Part], *, in_pieces: bool = False) -> Step:
        """Run the parts in one batch."""
        batch = sequence_batch(parts, self._cache, self._device)
        wants_hidden = self._speculation is not None and self._speculation.wants_hidden
        if wants_hidden or in_pieces:
            batch = replace(batch, wants_hidden=wants_hidden, in_pieces=in_pieces)
        return self._backend.forward(batch)

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
        if sequence in self._active:
            self._active.remove(sequence)
        if sequence.slot is not None:
            if self._speculation is not None:
                self._speculation.forget(sequence.slot)
            self._slots.give_back(sequence)


def _closed_error() -> ModelClosedError:
    return ModelClosedError("the model was closed", hint="load it again with ErnieModel.from_pretrained(...)")
