"""What is asked of every side: token ids drawn afresh for each repetition, and how many tokens to generate."""

from __future__ import annotations

import random
from dataclasses import dataclass

NEW_TOKENS = 64

NUM_REQUESTS = 32
GROUP_SIZE = 4
CONTEXT_TOKENS = 1024

# Ids below are special tokens, digits and bytes in ERNIE's vocabulary; ids above 100,000 are unused ones.
_LOWEST_ID, _HIGHEST_ID = 300, 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt, and how many new tokens it gets (never fewer: nothing stops early)."""

    token_ids: tuple[int, ...]
    num_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One repetition's prompts, the same for every side.

    `first_token` asks for one token after a prompt; `decode` for 65 after another, so that nothing cached helps.
    """

    first_token: Request
    decode: Request
    mixed: tuple[Request, ...]


def draw_workload(repetition: int, vocab_size: int, prompt_tokens: int) -> Workload:
    """Draw the prompts of one repetition; the same numbers give the same prompts."""
    rng = random.Random(f"benchmark {repetition}")
    highest = min(_HIGHEST_ID, vocab_size - 1)

    def request(num_prompt_tokens: int, num_new_tokens: int) -> Request:
        token_ids = tuple(rng.randint(_LOWEST_ID, highest) for _ in range(num_prompt_tokens))
        return Request(token_ids=token_ids, num_new_tokens=num_new_tokens)

    return Workload(
        first_token=request(prompt_tokens, 1),
        decode=request(prompt_tokens, NEW_TOKENS + 1),
        mixed=tuple(request(*lengths) for lengths in _mixed_lengths()),
    )


def _mixed_lengths() -> list[tuple[int, int]]:
    """Prompt and reply lengths of the mixed requests, the same in every repetition: 16 to 256, and 16 to 128."""
    rng = random.Random(0)
    prompts = [rng.randint(16, 256) for _ in range(NUM_REQUESTS)]
    replies = [rng.randint(16, 128) for _ in range(NUM_REQUESTS)]
    return list(zip(prompts, replies, strict=True))
