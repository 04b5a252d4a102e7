"""Logits to token ids: `build_sampler` composes a request's sampler once, and each step is one call of it.

Whatever goes over a whole row of logits on a CPU is done by numpy, on the calling thread alone. torch shares such work
among its threads, and these look for more of it for a while after, on the processors of the native kernels' next step.
"""

from ernie45.sampling.draw import Best, check_finite, greedy_tokens
from ernie45.sampling.sampler import Drawn, Sampler, build_sampler

__all__ = ["Best", "Drawn", "Sampler", "build_sampler", "check_finite", "greedy_tokens"]
