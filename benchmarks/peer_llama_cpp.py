"""llama.cpp as a side of `benchmarks.peers`: PYTHON -m benchmarks.peer_llama_cpp FILE.gguf

PYTHON has llama-cpp-python, built on this machine so that it uses what the CPU has.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from typing import Any, final

import llama_cpp  # type: ignore[import-not-found]

from benchmarks.peer_protocol import serve
from benchmarks.workloads import CONTEXT_TOKENS, Request

_BATCH_TOKENS = 512


@final
class LlamaCppSide:
    """Evaluates tokens without sampling: after the prompt come random ones, so that routing does not repeat itself."""

    def __init__(self, file: str, *, flash_attention: bool, mapped: bool) -> None:
        if mapped:
            _keep_weights_as_stored()
        num_threads = os.cpu_count()
        self._model: Any = llama_cpp.Llama(
            file,
            n_ctx=CONTEXT_TOKENS,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            n_batch=_BATCH_TOKENS,
            n_ubatch=_BATCH_TOKENS,
            flash_attn=flash_attention,
            use_mmap=mapped,  # else not: the system may take back mapped pages while others have their turns
            verbose=False,
        )

    def describe(self) -> dict[str, object]:
        return {"version": llama_cpp.__version__}

    def alone(self, request: Request) -> tuple[float, float]:
        following = [random.choice(request.token_ids) for _ in range(request.num_new_tokens - 1)]
        self._model.reset()
        started = time.perf_counter()
        self._model.eval(request.token_ids)
        first = time.perf_counter()
        for token_id in following:
            self._model.eval([token_id])
        return first - started, time.perf_counter() - first

    def together(self, requests: Sequence[Request]) -> float:
        """As its server does: each step has a token of every running request, and as much of the prompts as fits."""
        params = self._model.context_params
        params.n_seq_max = len(requests)
        params.n_ctx = len(requests) * CONTEXT_TOKENS
        context = llama_cpp.llama_init_from_model(self._model.model, params)
        batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        rows = [_Row(sequence, request) for sequence, request in enumerate(requests)]
        started = time.perf_counter()
        while running := [row for row in rows if not row.is_done]:
            batch.n_tokens = 0
            for row in sorted(running, key=lambda row: row.in_prefill):
                row.add_to(batch)
            if llama_cpp.llama_decode(context, batch) != 0:
                raise RuntimeError("llama_decode failed")
        seconds = time.perf_counter() - started
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return seconds


@final
class _Row:
    """A request of a batch. Its last token needs no step of its own: it is drawn from the one before."""

    def __init__(self, sequence: int, request: Request) -> None:
        self._sequence = sequence
        following = random.choices(request.token_ids, k=request.num_new_tokens - 1)
        self._token_ids = (*request.token_ids, *following)
        self._num_prompt_tokens = len(request.token_ids)
        self._num_cached = 0

    @property
    def is_done(self) -> bool:
        return self._num_cached == len(self._token_ids)

    @property
    def in_prefill(self) -> bool:
        return self._num_cached < self._num_prompt_tokens

    def add_to(self, batch: Any) -> None:
        """Its next token, or as many of its prompt's as there is room for."""
        end = self._num_prompt_tokens if self.in_prefill else self._num_cached + 1
        end = min(end, self._num_cached + _BATCH_TOKENS - batch.n_tokens)
        for position in range(self._num_cached, end):
            index = batch.n_tokens
            batch.token[index] = self._token_ids[position]
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = self._sequence
            batch.logits[index] = position >= self._num_prompt_tokens - 1
            batch.n_tokens = index + 1
        self._num_cached = end


def _keep_weights_as_stored() -> None:
    """Have none repacked when they are loaded, for which llama-cpp-python has no option: that needs memory for all."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def params() -> Any:
        values = defaults()
        values.use_extra_bufts = False
        return values

    llama_cpp.llama_cpp.llama_model_default_params = params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="a GGUF file")
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--mapped", action="store_true", help="map the file, for a model larger than memory")
    options = parser.parse_args()
    serve(lambda: LlamaCppSide(options.file, flash_attention=options.flash_attention, mapped=options.mapped))


if __name__ == "__main__":
    main()
