"""ernie45 as a side of `benchmarks.peers`, by its public calls: python -m benchmarks.ours MODEL --quantization int4"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import final

from benchmarks.peer_protocol import serve
from benchmarks.workloads import CONTEXT_TOKENS, Request
from ernie45 import ErnieModel, __version__


@final
class ErnieSide:
    """A model with room for `max_batch` requests at a time."""

    def __init__(self, name: str, quantization: str, max_batch: int) -> None:
        self._model = ErnieModel.from_pretrained(
            name,
            quantization=quantization,
            device="cpu",
            context_tokens=CONTEXT_TOKENS,
            max_batch=max_batch,
            progress=False,
        )

    def describe(self) -> dict[str, object]:
        return {"version": __version__, "weight_bytes_a_token": weight_bytes_a_token(self._model)}

    def alone(self, request: Request) -> tuple[float, float]:
        started = time.perf_counter()
        chunks = self._model.stream_generate(
            request.token_ids, max_new_tokens=request.num_new_tokens, temperature=0, ignore_eos=True
        )
        times = [time.perf_counter() for chunk in chunks for _ in chunk.token_ids]
        assert len(times) == request.num_new_tokens
        return times[0] - started, times[-1] - times[0]

    def together(self, requests: Sequence[Request]) -> float:
        items = [{"prompt": each.token_ids, "max_new_tokens": each.num_new_tokens} for each in requests]
        started = time.perf_counter()
        completions = self._model.batch_generate(items, temperature=0, ignore_eos=True)
        seconds = time.perf_counter() - started
        for request, completion in zip(requests, completions, strict=True):
            assert len(completion.token_ids) == request.num_new_tokens
        return seconds


def weight_bytes_a_token(model: ErnieModel) -> int:
    """What one token reads of the weights: all but the embedding's other rows and the experts not chosen."""
    plan = model.plan
    # A plan's token also reads half of its context's keys and values.
    kv_bytes = sum(device.parts["kv_cache"] for device in plan.devices) // (2 * plan.max_batch)
    return sum(device.token_bytes for device in plan.devices) - kv_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="name or folder")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--max-batch", type=int, default=1)
    options = parser.parse_args()
    serve(lambda: ErnieSide(options.model, options.quantization, options.max_batch))


if __name__ == "__main__":
    main()
