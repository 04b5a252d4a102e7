from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import InvalidRequestError, OutOfMemoryError
from ernie45.memory.budget import Budget, fit, kv_bytes, parse_bytes
from ernie45.spec import ModelSpec, parse_spec

GIB = 2**30


def spec_of(**entries: Any) -> ModelSpec:
    """The published 0.3B: 18,432 bytes of KV cache a token in bf16."""
    config = {
        "model_type": "ernie4_5",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 103424,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
    }
    return parse_spec({**config, **entries})


def budget(memory_bytes: int, *, weight_bytes: int = 0, entries: dict[str, Any] | None = None, **asked: Any) -> Budget:
    options: dict[str, Any] = {"context_tokens": None, "max_batch": None, **asked}
    return fit(
        spec_of(**(entries or {})), weight_bytes=weight_bytes, bytes_per_value=2, memory_bytes=memory_bytes, **options
    )


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GiB", 12 * GIB),
        ("12 gib", 12 * GIB),
        ("12GB", 12 * 10**9),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("800MB", 800 * 10**6),
        ("500MiB", 500 * 2**20),
        ("64KiB", 65536),
        ("64kB", 64000),
        ("2TiB", 2 * 2**40),
        ("1TB", 10**12),
        ("123", 123),
        ("123B", 123),
        ("0", 0),
    ],
)
def test_memory_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1e9", "12 parsecs", "1,5GiB", "1.GiB", "nan", 12, None, ["1GiB"]]
)
def test_what_is_no_memory_size(text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not a memory size") as caught:
        parse_bytes(text)
    assert repr(text) in caught.value.message
    assert "GiB" in caught.value.hint


def test_kv_cache_of_the_published_model() -> None:
    assert kv_bytes(spec_of(), context_tokens=1, max_batch=1, bytes_per_value=2) == 18_432
    assert kv_bytes(spec_of(), context_tokens=131072, max_batch=1, bytes_per_value=2) == 9 * GIB // 4
    assert kv_bytes(spec_of(), context_tokens=10, max_batch=3, bytes_per_value=4) == 18_432 * 2 * 30


def test_with_room_for_all_the_defaults_are_taken() -> None:
    assert budget(100 * GIB) == Budget(context_tokens=8192, max_batch=32)
    assert budget(100 * GIB, entries={"max_position_embeddings": 100}) == Budget(context_tokens=100, max_batch=32)


def test_rows_give_way_before_tokens() -> None:
    row_bytes = 8192 * 18_432
    assert budget(5 * row_bytes) == Budget(context_tokens=8192, max_batch=5)
    assert budget(6 * row_bytes - 1) == Budget(context_tokens=8192, max_batch=5)
    assert budget(row_bytes - 1) == Budget(context_tokens=8191, max_batch=1)
    assert budget(256 * 18_432) == Budget(context_tokens=256, max_batch=1)
    assert budget(64 * 18_432, entries={"max_position_embeddings": 64}) == Budget(context_tokens=64, max_batch=1)


def test_weights_take_their_part_first() -> None:
    row_bytes = 8192 * 18_432
    assert budget(GIB + 2 * row_bytes, weight_bytes=GIB) == Budget(context_tokens=8192, max_batch=2)


def test_what_is_asked_for_is_kept() -> None:
    row_bytes = 8192 * 18_432
    assert budget(row_bytes, max_batch=4) == Budget(context_tokens=2048, max_batch=4)
    assert budget(row_bytes, context_tokens=1000) == Budget(context_tokens=1000, max_batch=8)
    assert budget(row_bytes, context_tokens=1000, max_batch=3) == Budget(context_tokens=1000, max_batch=3)
    assert budget(100 * GIB, context_tokens=131072, max_batch=40) == Budget(context_tokens=131072, max_batch=40)


@pytest.mark.parametrize(
    ("memory_bytes", "weight_bytes", "asked"),
    [
        (GIB, 2 * GIB, {}),
        (GIB, GIB, {}),
        (GIB + 256 * 18_432 - 1, GIB, {}),
        (3 * GIB, 1 * GIB, {"context_tokens": 131072}),
        (3 * GIB, 1 * GIB, {"max_batch": 10**6}),
        (3 * GIB, 1 * GIB, {"context_tokens": 100_000, "max_batch": 2}),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    memory_bytes: int, weight_bytes: int, asked: dict[str, Any]
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        budget(memory_bytes, weight_bytes=weight_bytes, **asked)
    assert f"weights {weight_bytes / GIB:.2f} GiB" in caught.value.message
    assert f"there are {memory_bytes / GIB:.2f} GiB" in caught.value.message
    assert "context_tokens=" in caught.value.hint


def test_the_needed_amount_is_what_then_fits() -> None:
    with pytest.raises(OutOfMemoryError, match=r"needs 4\.50 GiB \(weights 0\.0 MiB, KV cache for 2 x 131072 tokens"):
        budget(GIB, context_tokens=131072, max_batch=2)
    assert budget(9 * GIB // 2, context_tokens=131072, max_batch=2) == Budget(context_tokens=131072, max_batch=2)


@pytest.mark.parametrize("asked", [0, -1, 131073, 10.5, "many", True])
def test_a_context_the_model_cannot_have(asked: Any) -> None:
    with pytest.raises(InvalidRequestError, match="131072") as caught:
        budget(GIB, context_tokens=asked)
    assert repr(asked) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("asked", [0, -1, 1.5, "many", True])
def test_a_batch_that_is_no_number_of_rows(asked: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_batch") as caught:
        budget(GIB, max_batch=asked)
    assert repr(asked) in caught.value.message
    assert caught.value.hint
