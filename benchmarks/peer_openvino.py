"""OpenVINO as a side of `benchmarks.peers`: PYTHON -m benchmarks.peer_openvino FOLDER

PYTHON has openvino; FOLDER is what `--export CHECKPOINT --bits 8|4` wrote, which takes optimum-intel and nncf as well.
optimum-intel does not know ERNIE 4.5: the weights of a dense model go into a Llama of the same shape, which costs the
same but pairs the halves of a head differently, so its tokens mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from benchmarks.peer_protocol import serve
from benchmarks.workloads import Request

_SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"),
)


@final
class OpenVinoSide:
    """Evaluates tokens without sampling; a prompt gives logits for each of its tokens."""

    def __init__(self, folder: Path) -> None:
        import openvino  # type: ignore[import-not-found]

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the system may take back mapped pages while others have their turns
        settings = {"INFERENCE_NUM_THREADS": os.cpu_count(), "PERFORMANCE_HINT": "LATENCY"}
        compiled = core.compile_model(core.read_model(folder / "openvino_model.xml"), "CPU", settings)
        self._request: Any = compiled.create_infer_request()

    def describe(self) -> dict[str, object]:
        return {"version": importlib.metadata.version("openvino")}

    def alone(self, request: Request) -> tuple[float, float]:
        following = [random.choice(request.token_ids) for _ in range(request.num_new_tokens - 1)]
        num_prompt_tokens = len(request.token_ids)
        self._request.reset_state()
        started = time.perf_counter()
        self._run(request.token_ids, 0)
        first = time.perf_counter()
        for index, token_id in enumerate(following):
            self._run([token_id], num_prompt_tokens + index)
        return first - started, time.perf_counter() - first

    def together(self, requests: Sequence[Request]) -> float:
        """One after the other: the model's state is that of one batch, whose rows begin and end together."""
        return sum(sum(self.alone(request)) for request in requests)

    def _run(self, token_ids: Sequence[int], num_cached: int) -> None:
        end = num_cached + len(token_ids)
        self._request.infer(
            {
                "input_ids": np.array([token_ids]),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(num_cached, end)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )


def export(checkpoint: Path, folder: Path, bits: int) -> None:
    """Write a dense checkpoint as OpenVINO's, its matrices in 8 bits, or in 4 with a scale for each 32."""
    import torch
    from optimum.intel import (  # type: ignore[import-not-found]
        OVModelForCausalLM,
        OVWeightQuantizationConfig,
    )
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((checkpoint / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in _SHAPE})).to(torch.bfloat16)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    model.tie_weights()
    if bits == 8:
        quantization = OVWeightQuantizationConfig(bits=8, sym=True)
    else:
        quantization = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as as_llama:
        model.save_pretrained(as_llama)
        del model
        OVModelForCausalLM.from_pretrained(
            as_llama, export=True, quantization_config=quantization, compile=False
        ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--export", type=Path, metavar="CHECKPOINT", help="write FOLDER, then end")
    parser.add_argument("--bits", type=int, choices=[8, 4], default=8)
    options = parser.parse_args()
    if options.export is not None:
        export(options.export, options.folder, options.bits)
        return
    serve(lambda: OpenVinoSide(options.folder))


if __name__ == "__main__":
    main()
