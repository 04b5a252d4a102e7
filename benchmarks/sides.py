"""What two sides are called in reports, and transformers as one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import GROUP_SIZE, Request

OURS = "ernie45"
EAGER = "transformers"


class TransformersSide:
    """transformers' `generate`: as it comes, with its static cache, or with that and a compiled forward."""

    def __init__(self, folder: Path, *, static_cache: bool, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM, CompileConfig

        torch.set_num_threads(os.cpu_count() or 1)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if static_cache:
            self._options["cache_implementation"] = "static"
        if compiled:
            compile_config = CompileConfig(fullgraph=False, mode="default")
            # Without it, generate() compiles on accelerators only, and there is no public way to ask for more.
            compile_config._compile_all_devices = True
            self._options["compile_config"] = compile_config

    def generate_many(self, requests: Sequence[Request]) -> None:
        """Groups of four in order, padded on the left; a group runs until its longest reply is done."""
        for first in range(0, len(requests), GROUP_SIZE):
            group = requests[first : first + GROUP_SIZE]
            self._generate([each.token_ids for each in group], max(each.num_new_tokens for each in group))

    def _generate(self, prompts: Sequence[tuple[int, ...]], num_new_tokens: int) -> None:
        width = max(map(len, prompts))
        token_ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts])
        with torch.no_grad():
            result = self._model.generate(
                token_ids,
                attention_mask=mask,
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                use_cache=True,
                **self._options,
            )
        assert result.shape == (len(prompts), width + num_new_tokens)
