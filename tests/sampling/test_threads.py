"""On a CPU a draw leaves torch's threads alone, so that they never look for work beside the native kernels."""

from __future__ import annotations

import subprocess
import sys

# torch starts its threads with the first operation that it shares among them, so that new threads of a fresh process
# tell, whatever else the machine does. The operation at the end is one of those, and shows that it is so.
DRAWS = """
import numpy, psutil, torch
from ernie45.sampling import build_sampler, greedy_tokens
from ernie45.types.requests import Sampling

V, process = 103_424, psutil.Process()
torch.set_num_threads(3)
peaked = numpy.random.default_rng(1).standard_normal(V, dtype=numpy.float32) * 4
rows = [peaked, peaked / 8, peaked.round()]  # few tokens are likely, many are, and many are equally so
before = process.num_threads()
for options in (
    {"temperature": 0.0, "logprobs": 20},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40},
    {"logit_bias": {3: 5.0, V - 1: -100.0}},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
):
    for row in map(torch.from_numpy, rows):
        sampler = build_sampler(
            Sampling(**options),
            num_token_ids=V - 100,
            vocab_size=V,
            prompt_ids=range(20_000),
            device=torch.device("cpu"),
        )
        sampler.guess(row, 1)
        sampler(row)
        sampler(row)
        assert process.num_threads() == before, options
greedy_tokens(torch.from_numpy(numpy.stack(rows)), V - 100)
assert process.num_threads() == before
torch.from_numpy(peaked).exp()
assert process.num_threads() > before, "torch has no threads to leave alone"
"""


def test_draws_leave_the_threads_of_torch_alone() -> None:
    finished = subprocess.run([sys.executable, "-c", DRAWS], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
