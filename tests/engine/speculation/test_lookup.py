"""Prompt lookup: which earlier place is followed, and how far."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ernie45.engine.speculation.lookup import MAX_MATCH, MIN_MATCH, PromptLookup, continuation
from ernie45.engine.speculation.proposer import Ask
from ernie45.sampling import build_sampler
from ernie45.types.requests import Sampling

SAMPLER = build_sampler(
    Sampling(temperature=0), num_token_ids=100, vocab_size=100, prompt_ids=[], device=torch.device("cpu")
)


def follow(ids: list[int], most: int = 3) -> list[int]:
    return continuation(np.array(ids, dtype=np.int32), most)


def ask(slot: int, ids: list[int], most: int = 3) -> Ask:
    return Ask(slot=slot, token_ids=ids, most=most, sampler=SAMPLER)


@pytest.mark.parametrize(
    ("ids", "guess"),
    [
        ([7], []),
        ([7, 7], []),  # one equal token is not enough
        ([1, 2, 9, 2], []),
        ([1, 2, 9, 8, 7, 1, 2], [9, 8, 7]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # of equally long matches the latest
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], [3, 6, 1]),  # but a longer one goes first
        ([3, 3, 3], [3, 3, 3]),  # it runs on into itself
        ([8, 4, 5, 6, 4, 5, 6, 4, 5], [6, 4, 5]),
        ([1, 2, 9, 1, 2], [9, 1, 2]),
    ],
)
def test_what_followed_the_longest_latest_match_is_copied(ids: list[int], guess: list[int]) -> None:
    assert follow(ids) == guess


def naive(ids: list[int], most: int) -> list[int]:
    for length in range(MAX_MATCH, MIN_MATCH - 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                guess: list[int] = []
                while len(guess) < most:
                    guess.append((ids + guess)[end + len(guess)])
                return guess
    return []


def test_it_finds_what_a_search_of_everything_finds() -> None:
    numbers = random.Random(1)
    found = 0
    for _ in range(400):
        ids = [numbers.randrange(3) for _ in range(numbers.randrange(1, 40))]
        guess = follow(ids, 5)
        assert guess == naive(ids, 5), ids
        found += bool(guess)
    assert found > 200


def test_sequences_are_told_apart_and_forgotten() -> None:
    lookup = PromptLookup()
    first, second = [1, 2, 3, 1, 2], [1, 2, 4, 1, 2]
    assert lookup.propose([ask(0, first), ask(1, second)]) == [[3, 1, 2], [4, 1, 2]]
    assert lookup.propose([ask(1, [*second, 4]), ask(0, [*first, 9])]) == [[1, 2, 4], []]
    lookup.forget(0)
    lookup.forget(0)
    assert lookup.propose([ask(0, [6, 7, 8, 6, 7], most=1)]) == [[8]]


def test_a_long_sequence_grows_token_by_token() -> None:
    lookup = PromptLookup()
    ids = list(range(100))
    for token_id in [*range(50, 90)]:
        ids.append(token_id)
        expected = [token_id + 1] if token_id > 50 else []
        assert lookup.propose([ask(3, ids, most=1)]) == [expected]
