from __future__ import annotations

from typing import Any

import pytest

from ernie45.errors import InvalidRequestError
from ernie45.memory.budget import (
    Limits,
    check_budget,
    check_kv_dtype,
    kv_bytes_per_token,
    parse_bytes,
    parse_limits,
)
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


@pytest.mark.parametrize("text", ["9" * 400, "9" * 30 + "TiB"])
def test_a_size_that_no_machine_has(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a memory size") as caught:
        parse_limits(text)
    assert len(caught.value.message) < 200


def test_kv_cache_of_the_published_model() -> None:
    assert kv_bytes_per_token(spec_of(), bytes_per_value=2, kv_dtype="auto") == 18_432
    assert kv_bytes_per_token(spec_of(), bytes_per_value=4, kv_dtype="auto") == 18_432 * 2


def test_an_int8_kv_cache_has_a_byte_for_a_number_and_two_for_a_scale() -> None:
    """2 · 18 layers · 2 heads · (128 + 2) bytes, whatever the model's dtype."""
    for bytes_per_value in (2, 4):
        assert kv_bytes_per_token(spec_of(), bytes_per_value=bytes_per_value, kv_dtype="int8") == 2 * 18 * 2 * 130


@pytest.mark.parametrize("asked", ["bfloat16", "int4", "", None])
def test_an_unknown_kv_dtype(asked: Any) -> None:
    with pytest.raises(InvalidRequestError, match="kv_dtype=") as caught:
        check_kv_dtype(asked)
    assert "int8" in caught.value.hint


def test_memory_limits() -> None:
    assert parse_limits(None) == Limits(devices={})
    assert parse_limits("12GiB") == Limits(devices={"cpu": 12 * GIB})
    named = parse_limits({"cuda": "1GiB", "cuda:1": "2GiB", "cpu": "3GiB", "disk": "5GB"})
    assert named == Limits(devices={"cuda:0": GIB, "cuda:1": 2 * GIB, "cpu": 3 * GIB}, disk_bytes=5 * 10**9)
    assert parse_limits({"cpu:0": "1", "cpu:1": "2"}).devices == {"cpu:0": 1, "cpu:1": 2}


@pytest.mark.parametrize("memory", [{"gpu": "1GiB"}, {"cuda:x": "1GiB"}, {1: "1GiB"}, {"cpu:": "1GiB"}, {"": "1GiB"}])
def test_what_is_no_device(memory: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is no device") as caught:
        parse_limits(memory)
    assert "'cuda:1'" in caught.value.hint


@pytest.mark.parametrize(
    "memory", [{"cuda": "1", "cuda:0": "1"}, {"cpu": "1", "cpu:1": "1"}, {"cpu:1": "1", "cpu": "1"}]
)
def test_a_device_named_twice(memory: Any) -> None:
    with pytest.raises(InvalidRequestError, match="twice"):
        parse_limits(memory)


def test_a_context_and_a_batch_that_can_be_had() -> None:
    for context_tokens in (None, 1, 131072):
        check_budget(spec_of(), context_tokens=context_tokens, max_batch=10**9)


@pytest.mark.parametrize("asked", [0, -1, 131073, 10.5, "many", True])
def test_a_context_the_model_cannot_have(asked: Any) -> None:
    with pytest.raises(InvalidRequestError, match="131072") as caught:
        check_budget(spec_of(), context_tokens=asked, max_batch=None)
    assert repr(asked) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("asked", [0, -1, 1.5, "many", True])
def test_a_batch_that_is_no_number_of_rows(asked: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_batch") as caught:
        check_budget(spec_of(), context_tokens=None, max_batch=asked)
    assert repr(asked) in caught.value.message
    assert caught.value.hint
