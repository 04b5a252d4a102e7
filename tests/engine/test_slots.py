"""Which slot a prompt gets, and what is copied into it."""

from __future__ import annotations

import pytest
import torch

from ernie45.backends.kv_cache import KVCache
from ernie45.engine.sequence import Sequence, Submission
from ernie45.engine.slots import SlotPool
from ernie45.engine.stream import TokenStream
from ernie45.sampling import build_sampler
from ernie45.types.placement import Placement
from ernie45.types.requests import TokenRequest
from tests.engine.test_engine import CountingBackend
from tests.engine.test_media import asking, picture

CPU = torch.device("cpu")


def pool(num_slots: int = 3, prefix_tokens: int | None = 1) -> SlotPool:
    cache = KVCache.allocate(
        CountingBackend().spec,
        num_slots=num_slots,
        context_tokens=64,
        dtype=torch.float32,
        kv_dtype="auto",
        placement=Placement.on("cpu", 1),
    )
    return SlotPool(cache, num_slots=num_slots, prefix_tokens=prefix_tokens)


def sequence(*ids: int, request: TokenRequest | None = None) -> Sequence:
    request = request or TokenRequest(token_ids=ids, max_new_tokens=9)
    sampler = build_sampler(request.sampling, num_token_ids=50, vocab_size=50, prompt_ids=request.token_ids, device=CPU)
    return Sequence(Submission(request=request, stream=TokenStream(capacity=9, wake_producer=lambda: None)), sampler)


def lent(slots: SlotPool, *ids: int, request: TokenRequest | None = None) -> Sequence:
    made = sequence(*ids, request=request)
    slots.lend(made)
    return made


def run(slots: SlotPool, made: Sequence, num_tokens: int | None = None) -> None:
    """Have its next tokens in the cache: each one's key is its id."""
    assert made.slot is not None
    end = made.num_prompt_tokens if num_tokens is None else made.num_cached + num_tokens
    positions = torch.arange(made.num_cached, end)
    ids = torch.tensor(made.token_ids[made.num_cached : end]).float()[:, None, None].expand(-1, 1, 2)
    slots._cache.write(0, torch.full_like(positions, made.slot), positions, ids, -ids)
    made.num_cached = end
    slots.note(made)


def held(slots: SlotPool, made: Sequence) -> list[float]:
    assert made.slot is not None
    keys, values = slots._cache.read(0, made.slot, made.num_cached)
    assert torch.equal(keys, -values)
    return keys[0, :, 0].tolist()


def done(slots: SlotPool, *ids: int) -> int:
    """A request that came and went; its slot."""
    made = lent(slots, *ids)
    run(slots, made)
    slot = made.slot
    slots.give_back(made)
    assert slot is not None
    return slot


def test_a_prompt_continues_in_the_slot_whose_content_it_begins_with() -> None:
    slots = pool()
    first, second = done(slots, 1, 2, 3), done(slots, 4, 5, 6)
    assert first != second
    made = lent(slots, 4, 5, 6, 7)
    assert (made.slot, made.num_cached, made.num_reused) == (second, 3, 3)
    assert held(slots, made) == [4, 5, 6]


def test_what_another_slot_keeps_beyond_the_shared_part_is_not_overwritten() -> None:
    slots = pool()
    first = done(slots, 1, 2, 3, 4, 5)
    made = lent(slots, 1, 2, 9, 9)
    assert made.slot != first
    assert (made.num_cached, held(slots, made)) == (2, [1, 2])
    again = lent(slots, 1, 2, 3, 4, 5, 6)
    assert (again.slot, again.num_cached) == (first, 5)


def test_a_running_row_is_copied_from_as_well_and_never_lent() -> None:
    slots = pool(2)
    running = lent(slots, 1, 2, 3)
    run(slots, running)
    made = lent(slots, 1, 2, 3, 4)
    assert made.slot != running.slot
    assert held(slots, made) == [1, 2, 3]
    assert slots.num_free == 0


def test_the_slot_given_back_longest_ago_is_overwritten_after_the_empty_ones() -> None:
    slots = pool(3)
    order = [done(slots, start, start + 1) for start in (10, 20, 30)]
    assert sorted(order) == [0, 1, 2]
    assert done(slots, 20, 21, 22) == order[1]  # used again
    assert done(slots, 40, 41) == order[0]
    assert done(slots, 43, 44) == order[2]
    assert lent(slots, 20, 21, 22, 23).num_cached == 3


def test_of_slots_that_hold_nothing_the_latest_is_lent_again() -> None:
    slots = pool(3, prefix_tokens=None)
    assert [done(slots, start, start + 1) for start in (10, 20, 30)] == [0, 0, 0]
    assert lent(slots, 10, 11, 12).num_cached == 0


@pytest.mark.parametrize(("num_same", "num_shared"), [(0, 0), (1, 1), (4, 4), (5, 5), (8, 7)])
def test_the_last_token_of_a_prompt_is_always_run(num_same: int, num_shared: int) -> None:
    slots = pool()
    done(slots, *range(8))
    assert lent(slots, *range(num_same), *[40] * (8 - num_same)).num_cached == num_shared


@pytest.mark.parametrize(("num_same", "num_shared"), [(3, 0), (4, 4), (9, 8), (10, 8), (12, 8)])
def test_prefixes_end_at_multiples_of_the_backends_unit(num_same: int, num_shared: int) -> None:
    slots = pool(prefix_tokens=4)
    done(slots, *range(12))
    made = lent(slots, *range(num_same), *[40] * (12 - num_same))
    assert made.num_cached == num_shared


@pytest.mark.parametrize(("prefix_tokens", "num_shared"), [(1, 5), (2, 2)])
def test_generated_tokens_are_taken_over_only_where_grouping_does_not_matter(
    prefix_tokens: int, num_shared: int
) -> None:
    slots = pool(prefix_tokens=prefix_tokens)
    made = lent(slots, 1, 2, 3)
    run(slots, made)
    made.token_ids += [4, 5, 6]
    run(slots, made, 2)  # the last one drawn was not run
    slots.give_back(made)
    assert lent(slots, *range(1, 9)).num_cached == num_shared


def test_a_prompt_catches_up_with_what_another_has_by_now() -> None:
    slots = pool()
    first, second = lent(slots, *range(9)), lent(slots, *range(8), 20)
    assert second.num_cached == 0
    run(slots, first, 4)
    slots.catch_up(second)
    assert (second.num_cached, held(slots, second)) == (4, [0, 1, 2, 3])
    run(slots, second, 2)
    slots.catch_up(first)
    assert held(slots, first) == [0, 1, 2, 3, 4, 5]
    assert (first.num_reused, second.num_reused) == (2, 4)
    run(slots, first)
    slots.catch_up(second)
    assert held(slots, second) == [*range(8)]


def test_what_is_overwritten_is_forgotten() -> None:
    slots = pool(1)
    done(slots, 1, 2, 3, 4)
    made = lent(slots, 1, 2, 9, 9)
    slots.give_back(made)  # cancelled before it ran
    assert lent(slots, 1, 2, 3, 4).num_cached == 2


def test_a_prompt_is_scored_from_the_first_position_asked_for() -> None:
    slots = pool()
    done(slots, *range(8))
    assert lent(slots, request=TokenRequest(token_ids=tuple(range(8)), logit_positions=(5, 7))).num_cached == 5
    assert lent(slots, request=TokenRequest(token_ids=tuple(range(8)), logit_positions=())).num_cached == 7


def test_another_picture_under_the_same_ids_ends_what_is_shared_before_its_marker() -> None:
    slots = pool(8)
    asked = asking(5, 6, picture(7), 8, 9)  # 5 6 START HERE HERE END 8 9
    first = lent(slots, request=asked)
    run(slots, first)
    slots.give_back(first)
    assert lent(slots, request=asked).num_cached == 7
    assert lent(slots, request=asking(5, 6, picture(7), 8, 1)).num_cached == 7
    assert lent(slots, request=asking(5, 6, picture(8), 8, 9)).num_cached == 2
    assert lent(slots, *asked.token_ids).num_cached == 2, "text that looks like it"
    assert lent(slots, request=asking(picture(7), 8, 9)).num_cached == 0
    assert lent(slots, request=asking(5, 6, picture(7), picture(8), 9)).num_cached == 6
