"""Logits to token ids: `build_sampler` composes a request's sampler once, and each step is one call of it."""

from ernie45.sampling.draw import Best, check_finite, greedy_tokens
from ernie45.sampling.sampler import Drawn, Sampler, build_sampler

__all__ = ["Best", "Drawn", "Sampler", "build_sampler", "check_finite", "greedy_tokens"]
