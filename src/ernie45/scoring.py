"""What a model thinks of a given text: raw logits and log-probabilities, from scoring requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ernie45.devices import free_bytes
from ernie45.errors import InvalidRequestError, OutOfMemoryError
from ernie45.runners.base import Runner, wait_until_ready
from ernie45.types.prompts import Prompt
from ernie45.types.requests import TokenRequest
from ernie45.types.results import Score


def prompt_logits(runner: Runner, prompt: Prompt, positions: Sequence[int] | None, vocab_size: int) -> Tensor:
    """Logits [n, V] (float32, on the CPU) after the tokens at `positions`, or after every token.

    Raises:
        InvalidRequestError: a position outside the prompt.
        OutOfMemoryError: the result would not fit the memory that is free.
    """
    asked = range(len(prompt)) if positions is None else _checked(positions, len(prompt))
    ascending = sorted(set(asked))
    needed, free = len(asked) * vocab_size * 4, free_bytes(torch.device("cpu"))
    if needed > free:
        raise OutOfMemoryError(
            f"{len(asked)} rows of {vocab_size} logits take {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free",
            hint="ask for fewer positions=",
        )
    if not ascending:
        return torch.empty((0, vocab_size), dtype=torch.float32, device="cpu")
    result = torch.empty((len(ascending), vocab_size), dtype=torch.float32, device="cpu")
    filled = 0

    def keep(logits: Tensor) -> None:
        nonlocal filled
        result[filled : filled + len(logits)] = logits
        filled += len(logits)

    _score(runner, prompt, ascending, keep)
    if list(asked) == ascending:
        return result
    row_of = {position: row for row, position in enumerate(ascending)}
    return result[[row_of[position] for position in asked]]


def prompt_score(runner: Runner, prompt: Prompt) -> Score:
    """Log-probability of every token but the first, under the softmax of the raw logits before it.

    Raises:
        InvalidRequestError: fewer than two tokens.
    """
    if prompt.media:
        raise InvalidRequestError(
            f"a score is of text, and the prompt holds {len(prompt.media)} pictures or clips",
            hint="logits() takes what render() gives, pictures included",
        )
    if len(prompt) < 2:
        raise InvalidRequestError(
            f"a score needs at least two tokens, not {len(prompt)}",
            hint="the first token has nothing before it",
        )
    following = np.array(prompt.token_ids[1:])
    logprobs: list[float] = []

    def add(logits: Tensor) -> None:
        # By numpy: torch's threads would look for more work on the processors of the native kernels.
        rows = logits.cpu().numpy()
        next_ids = following[len(logprobs) : len(logprobs) + len(rows)]
        chosen, largest = rows[np.arange(len(rows)), next_ids], rows.max(axis=1)
        # logsumexp in place: nothing else of a step is as large as its logits.
        np.exp(np.subtract(rows, largest[:, None], out=rows), out=rows)
        logprobs.extend((chosen - (np.log(rows.sum(axis=1)) + largest)).tolist())

    _score(runner, prompt, range(len(prompt) - 1), add)
    return Score(
        token_ids=prompt.token_ids,
        logprobs=tuple(logprobs),
        perplexity=math.exp(-math.fsum(logprobs) / len(logprobs)),
    )


def _score(runner: Runner, prompt: Prompt, positions: Sequence[int], on_logits: Callable[[Tensor], None]) -> None:
    """Run the prompt, with the logits of ascending `positions` to `on_logits`, a few at a time."""
    num_rows = 0

    def hand_on(logits: Tensor) -> None:
        nonlocal num_rows
        num_rows += len(logits)
        on_logits(logits)

    handle = runner.submit(
        TokenRequest(
            token_ids=prompt.token_ids, media=prompt.media, logit_positions=tuple(positions), on_logits=hand_on
        )
    )
    try:
        while handle.poll() is None:
            wait_until_ready(handle)
    finally:
        handle.cancel()
    if num_rows != len(positions):
        raise RuntimeError(
            f"a bug in {type(runner).__module__}.{type(runner).__qualname__}, please report it: of {len(positions)} "
            f"positions, it gave on_logits the logits of {num_rows}"
        )


def _checked(positions: Sequence[int], num_tokens: int) -> list[int]:
    if not isinstance(positions, Sequence) or isinstance(positions, (str, bytes)):
        raise InvalidRequestError(
            f"positions must be a list of whole numbers, not {positions!r}", hint="e.g. positions=[-1]"
        )
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int) or not -num_tokens <= position < num_tokens:
            raise InvalidRequestError(
                f"position {position!r} is outside the prompt of {num_tokens} tokens",
                hint=f"positions count from 0 to {num_tokens - 1}, or from the end, -1 to -{num_tokens}",
            )
    return [position % num_tokens for position in positions]
