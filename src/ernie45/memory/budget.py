"""What a caller allows: memory, context and batch; and what a KV cache of that takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ernie45.errors import InvalidRequestError
from ernie45.spec import ModelSpec

DEFAULT_CONTEXT_TOKENS = 8192
DEFAULT_MAX_BATCH = 32
# A context chosen for the caller is no shorter than this; nobody can work with less.
MIN_CONTEXT_TOKENS = 256
# A photo should take the 28B model under a minute on two cores: 12 trillion operations, where 0.26 trillion a second
# were measured on its vision tower. At the published limit it is several minutes; a clip takes long all the same.
CPU_MAX_PIXELS = 1024 * 28 * 28
CPU_MAX_FRAME_PIXELS = 299 * 28 * 28

MemoryLimit = str | Mapping[str, str]
"""What may be used: "12GiB" of main memory, or sizes by device ("cpu", "cuda:0", …) and of "disk"."""

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

KVDtype = Literal["auto", "int8"]
"""How keys and values are kept: in the dtype of the arithmetic, or rounded to int8 with a scale."""

KV_BLOCK_TOKENS = 32
"""Tokens that lie together in the KV cache: every slot has room for whole blocks of them."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_MOST_BYTES = 2**60
_KV_SCALE_BYTES = 2
_DEVICE_NAME = re.compile(r"(cpu|cuda)(:\d+)?|mps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """KV room to reserve: `max_batch` slots of `context_tokens` tokens."""

    context_tokens: int
    max_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bytes that may be used of `devices`, by name in the order given, and of the disk, None if it was not named."""

    devices: Mapping[str, int]
    disk_bytes: int | None = None


def parse_bytes(text: str) -> int:
    """ "12GiB" (2^30), "12GB" (10^9), "500MiB" or a plain number of bytes -> bytes.

    Raises:
        InvalidRequestError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    num_bytes = float(match[1]) * unit if match and unit else math.inf
    if num_bytes > _MOST_BYTES:
        raise InvalidRequestError(f"{text!r:.100} is not a memory size", hint="write it like '12GiB' or '800MB'")
    return int(num_bytes)


def parse_limits(memory: MemoryLimit | None) -> Limits:
    """What `memory=` names; a text is the main memory. "cuda" is "cuda:0".

    Raises:
        InvalidRequestError: not a size, not a device, or a device named twice.
    """
    if memory is None:
        return Limits(devices={})
    if not isinstance(memory, Mapping):
        return Limits(devices={"cpu": parse_bytes(memory)})
    devices: dict[str, int] = {}
    for name, size in memory.items():
        if name == "disk":
            continue
        if not isinstance(name, str) or not _DEVICE_NAME.fullmatch(name):
            raise InvalidRequestError(
                f"memory= names {name!r}, which is no device", hint="use 'cpu', 'cuda', 'cuda:1', 'mps' or 'disk'"
            )
        name = "cuda:0" if name == "cuda" else name
        if name in devices or (name.startswith("cpu:") and "cpu" in memory):
            raise InvalidRequestError(f"memory= names {name!r} twice", hint="give one size to each device")
        devices[name] = parse_bytes(size)
    return Limits(devices=devices, disk_bytes=parse_bytes(memory["disk"]) if "disk" in memory else None)


def check_budget(spec: ModelSpec, *, context_tokens: int | None, max_batch: int | None) -> None:
    """Raises InvalidRequestError for a context outside 1 … the model's maximum, or a batch below 1."""
    if context_tokens is not None and not (_is_count(context_tokens) and context_tokens <= spec.max_context_tokens):
        raise InvalidRequestError(
            f"context_tokens must be from 1 to this model's maximum {spec.max_context_tokens}, not {context_tokens!r}",
            hint="leave it out for 8192 or the model's maximum",
        )
    if max_batch is not None and not _is_count(max_batch):
        raise InvalidRequestError(
            f"max_batch must be a whole number from 1, not {max_batch!r}", hint="leave it out for 32"
        )


def check_kv_dtype(kv_dtype: str) -> None:
    """Raises InvalidRequestError for anything but the values of `KVDtype`."""
    if kv_dtype not in get_args(KVDtype):
        raise InvalidRequestError(
            f"kv_dtype={kv_dtype!r} is none of {', '.join(map(repr, get_args(KVDtype)))}",
            hint="'auto' keeps keys and values in the model's dtype; 'int8' takes about half of that",
        )


def kv_bytes_per_token(spec: ModelSpec, *, bytes_per_value: int, kv_dtype: KVDtype) -> int:
    """Bytes of one token in the KV cache, over all layers.

    2 · layers · kv heads · head_dim · bytes per value; in int8 a byte per value, and a scale for each head's key and
    each head's value.
    """
    if kv_dtype == "int8":
        return spec.kv_values_per_token + spec.kv_values_per_token // spec.head_dim * _KV_SCALE_BYTES
    return spec.kv_values_per_token * bytes_per_value


def slot_tokens(context_tokens: int) -> int:
    """Tokens that a KV slot for a context of `context_tokens` has room for."""
    return -(-context_tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def in_words(num_bytes: int) -> str:
    """ "5.25 GiB" or "12.3 MiB"."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
