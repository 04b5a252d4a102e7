"""Rows that join and leave at random, among prompts that begin alike: each reply is the one it would be alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel
from ernie45.engine.engine import Engine
from ernie45.kernels.linear import packs
from ernie45.kernels.native import kernels
from ernie45.runners.base import Handle, wait_until_ready
from ernie45.types.requests import Sampling, TokenRequest
from tests.engine.cache_reading import CacheReadingBackend, events_of
from tests.engine.test_engine import drain

NUM_EVENTS = 1000
MAX_REPLY = 16
Submit = Callable[[TokenRequest], Handle]
Ids = tuple[int, ...]


def prompts(max_id: int, *shared_lengths: int) -> list[Ids]:
    """Families of six prompts that begin alike, one for each length, and four short ones."""
    numbers = random.Random(3)

    def ids(count: int) -> Ids:
        return tuple(numbers.randrange(3, max_id) for _ in range(count))

    families = [ids(length) for length in shared_lengths]
    return [begin + ids(numbers.randrange(1, 60)) for begin in families for _ in range(6)] + [ids(5) for _ in range(4)]


def asking(prompt: Ids, max_new_tokens: int = MAX_REPLY) -> TokenRequest:
    return TokenRequest(token_ids=prompt, sampling=Sampling(temperature=0.0), max_new_tokens=max_new_tokens)


def join_and_drop(submit: Submit, solo: dict[Ids, list[int]]) -> int:
    """Submit a request or part from one, `NUM_EVENTS` times, with up to eight under way; compare every reply with the
    solo one. How many prompt tokens were taken over."""
    numbers = random.Random(11)
    under_way: list[tuple[TokenRequest, Handle]] = []
    parted: list[tuple[TokenRequest, Handle]] = []
    for _ in range(NUM_EVENTS):
        if len(under_way) == 8 or (under_way and numbers.random() < 0.4):
            request, handle = under_way.pop(numbers.randrange(len(under_way)))
            parted.append((request, handle))
            if numbers.random() < 0.7:
                wait_until_ready(handle)
            if numbers.random() < 0.7:
                handle.cancel()
        else:
            request = asking(numbers.choice(list(solo)), numbers.randrange(1, MAX_REPLY + 1))
            under_way.append((request, submit(request)))
    num_reused = num_tokens = 0
    for request, handle in parted + under_way:
        events = events_of(handle)
        ids = [event.token_id for event in events if event.token_id is not None]
        assert ids == solo[request.token_ids][: len(ids)]
        assert events[-1].finish_reason == "cancelled" or len(ids) == request.max_new_tokens
        num_reused += events[-1].cached_tokens
        num_tokens += len(ids)
    assert num_tokens > NUM_EVENTS, "most were dropped before they began"
    return num_reused


@pytest.mark.parametrize(("prefix_tokens", "lengths"), [(1, (40, 90)), (512, (530, 1040))])
def test_random_joins_and_drops_on_a_backend_that_reads_everything(
    prefix_tokens: int, lengths: tuple[int, int]
) -> None:
    def engine(num_slots: int, *, prefix_cache: bool) -> Engine:
        backend = CacheReadingBackend(prefix_tokens)
        return Engine(backend, num_slots=num_slots, context_tokens=1200, num_token_ids=40, prefix_cache=prefix_cache)

    alone, shared = engine(1, prefix_cache=False), engine(5, prefix_cache=True)
    solo = {prompt: drain(alone.submit(asking(prompt)))[0] for prompt in prompts(40, *lengths)}
    assert join_and_drop(shared.submit, solo) > NUM_EVENTS * 10
    assert shared.num_free_slots == 5
    alone.close()
    shared.close()


@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_random_joins_and_drops_on_a_real_model(preset: str) -> None:
    if kernels() is None and (preset != "none" or not packs(torch.bfloat16, torch.device("cpu"))):
        pytest.skip("without the native kernels only bf16 in oneDNN promises equal bits")
    options: dict[str, Any] = {
        "device": "cpu", "dtype": "bfloat16", "quantization": preset, "context_tokens": 1200, "progress": False
    }  # fmt: skip
    with ErnieModel.from_pretrained("ernie45/tiny-dense", max_batch=1, prefix_cache=False, **options) as model:
        runner, vocab_size = model._loaded.runner, model.spec.vocab_size
        solo = {prompt: drain(runner.submit(asking(prompt)))[0] for prompt in prompts(vocab_size, 530, 1040)}
    with ErnieModel.from_pretrained("ernie45/tiny-dense", max_batch=5, **options) as model:
        assert join_and_drop(model._loaded.runner.submit, solo) > NUM_EVENTS * 10
