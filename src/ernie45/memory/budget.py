"""How long a context, and how many at once, fit beside the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ernie45.errors import InvalidRequestError, OutOfMemoryError
from ernie45.spec import ModelSpec

DEFAULT_CONTEXT_TOKENS = 8192
DEFAULT_MAX_BATCH = 32
# A context chosen for the caller is no shorter than this; nobody can work with less.
MIN_CONTEXT_TOKENS = 256

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """KV room to reserve: `max_batch` slots of `context_tokens` tokens."""

    context_tokens: int
    max_batch: int


def parse_bytes(text: str) -> int:
    """ "12GiB" (2^30), "12GB" (10^9), "500MiB" or a plain number of bytes -> bytes.

    Raises:
        InvalidRequestError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise InvalidRequestError(f"{text!r} is not a memory size", hint="write it like '12GiB' or '800MB'")
    return int(float(match[1]) * unit)


def kv_bytes(spec: ModelSpec, *, context_tokens: int, max_batch: int, bytes_per_value: int) -> int:
    """Bytes of the KV cache: 2 · layers · kv heads · head_dim · tokens · rows · bytes per value."""
    return spec.kv_values_per_token * context_tokens * max_batch * bytes_per_value


def fit(
    spec: ModelSpec,
    *,
    weight_bytes: int,
    bytes_per_value: int,
    memory_bytes: int,
    context_tokens: int | None,
    max_batch: int | None,
) -> Budget:
    """Choose what was left open so that weights and KV cache fit `memory_bytes`: first fewer rows, then fewer tokens.

    Raises:
        OutOfMemoryError: it does not fit, with both numbers.
        InvalidRequestError: a context outside 1 … the model's maximum, or a batch below 1.
    """
    if context_tokens is not None and not (_is_count(context_tokens) and context_tokens <= spec.max_context_tokens):
        raise InvalidRequestError(
            f"context_tokens must be from 1 to this model's maximum {spec.max_context_tokens}, not {context_tokens!r}",
            hint="leave it out for 8192 or the model's maximum",
        )
    if max_batch is not None and not _is_count(max_batch):
        raise InvalidRequestError(
            f"max_batch must be a whole number from 1, not {max_batch!r}", hint="leave it out for 32"
        )
    tokens = context_tokens or min(DEFAULT_CONTEXT_TOKENS, spec.max_context_tokens)
    bytes_per_token = kv_bytes(spec, context_tokens=1, max_batch=1, bytes_per_value=bytes_per_value)
    room_tokens = (memory_bytes - weight_bytes) // bytes_per_token
    rows = max_batch or max(1, min(DEFAULT_MAX_BATCH, room_tokens // tokens))
    if context_tokens is None:
        tokens = max(min(tokens, room_tokens // rows), min(tokens, MIN_CONTEXT_TOKENS))
    if rows * tokens > room_tokens:
        needed = weight_bytes + rows * tokens * bytes_per_token
        raise OutOfMemoryError(
            f"this needs {_size(needed)} (weights {_size(weight_bytes)}, KV cache for {rows} x {tokens} tokens "
            f"{_size(needed - weight_bytes)}), and there are {_size(memory_bytes)}",
            hint="give a smaller context_tokens= or max_batch=, more memory=, or choose a smaller model",
        )
    return Budget(context_tokens=tokens, max_batch=rows)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
