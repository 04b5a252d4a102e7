"""What runs is freed when it is left, cancelled, closed or dropped; many callers do not disturb each other."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45 import ContextLengthError, ErnieModel, InvalidRequestError, ModelClosedError
from ernie45.engine.engine import Engine
from ernie45.runners.local import LocalRunner

PROMPT = "the cat sat on"
MESSAGES = [{"role": "user", "content": "the cat"}]
HOT: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "ignore_eos": True}
LONG: dict[str, Any] = {**HOT, "max_new_tokens": 250}


def open_model(folder: Path) -> ErnieModel:
    return ErnieModel.from_pretrained(folder, device="cpu", progress=False)


def engine_of(model: ErnieModel) -> Engine:
    runner = model._loaded.runner
    assert isinstance(runner, LocalRunner)
    return runner._engine


def is_idle(model: ErnieModel) -> bool:
    engine = engine_of(model)
    with engine._changed:  # a request is either waiting or has a slot
        return not engine._waiting and engine.num_free_slots == 32


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ernie45-engine"}


# Leaving early


def test_leaving_a_stream_frees_its_slot(small_model: ErnieModel) -> None:
    stream = small_model.stream_generate([5], **LONG)
    next(stream)
    assert engine_of(small_model).num_free_slots == 31
    stream.close()
    assert eventually(lambda: is_idle(small_model))
    assert list(stream) == []

    with small_model.stream_generate([5], **LONG) as stream:
        next(stream)
    assert eventually(lambda: is_idle(small_model))

    for chunk in small_model.stream_generate([5], **LONG):
        assert chunk.token_ids
        break
    assert eventually(lambda: is_idle(small_model))

    small_model.stream_chat(MESSAGES, **HOT, max_new_tokens=200)  # dropped unread
    gc.collect()
    assert eventually(lambda: is_idle(small_model))


@pytest.mark.parametrize("name", ["agenerate", "astream_generate", "abatch_generate"])
def test_cancelling_a_task_frees_its_slots(small_model: ErnieModel, name: str) -> None:
    async def read(prompt: Any) -> None:
        if name != "astream_generate":
            await getattr(small_model, name)(prompt, **LONG)
        async for _ in small_model.astream_generate([5], **LONG):
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(read([[5], [6], [7]] if name == "abatch_generate" else [5]))
        while engine_of(small_model).num_free_slots == 32:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert eventually(lambda: is_idle(small_model))


def test_a_batch_that_cannot_start_leaves_nothing_running(small_model: ErnieModel) -> None:
    # The last item's bias is only checked where the request starts, when the others already run.
    items = [{"prompt": [5], **LONG}, {"prompt": [6], **LONG}, {"prompt": [7], "logit_bias": {999: 1.0}}]
    with pytest.raises(InvalidRequestError, match="999"):
        small_model.batch_generate(items)
    assert eventually(lambda: is_idle(small_model))
    with pytest.raises(ContextLengthError):
        small_model.batch_generate([[5], [7] * 300])
    assert is_idle(small_model)


def test_a_stream_keeps_a_model_alive_that_nobody_else_holds(small_folder_path: Path) -> None:
    stream = ErnieModel.from_pretrained(small_folder_path, progress=False).stream_generate([5], **LONG)
    gc.collect()
    assert len(list(stream)) > 1


def test_replies_nobody_reads_yet_hold_no_slot_that_others_wait_for(small_folder_path: Path) -> None:
    with ErnieModel.from_pretrained(small_folder_path, max_batch=1, progress=False) as model:
        for chunk, _ in zip(model.stream_generate([5], **LONG), range(3), strict=False):
            assert chunk.token_ids
            assert len(model.generate([6], temperature=0, max_new_tokens=2, ignore_eos=True).token_ids) == 2


# Many at once


def test_ten_threads_get_what_they_get_alone(small_model: ErnieModel) -> None:
    prompts = [[5 + seed, 30, 99][: 1 + seed % 3] for seed in range(10)]
    alone = [small_model.generate(prompts[seed], **HOT, seed=seed, max_new_tokens=15) for seed in range(10)]
    assert len({reply.text for reply in alone}) == 10
    together: dict[int, str] = {}

    def work(seed: int) -> None:
        together[seed] = small_model.generate(prompts[seed], **HOT, seed=seed, max_new_tokens=15).text

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == {seed: reply.text for seed, reply in enumerate(alone)}


def test_more_tasks_than_slots_all_get_their_reply(small_model: ErnieModel) -> None:
    expected = [small_model.generate([5, n], **HOT, seed=n, max_new_tokens=4).token_ids for n in range(5)]

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(small_model.agenerate([5, n % 5], **HOT, seed=n % 5, max_new_tokens=4) for n in range(60))
        )

    assert [reply.token_ids for reply in asyncio.run(main())] == expected * 12


# Lifetime


def test_close_ends_what_runs_and_gives_the_memory_back(small_folder_path: Path) -> None:
    before = engine_threads()
    model = open_model(small_folder_path)
    weight = weakref.ref(engine_of(model)._backend._decoder.embedding.weight)  # type: ignore[attr-defined]
    keys = weakref.ref(engine_of(model)._cache.keys[0].read(0, 1)._base)
    assert weight() is not None
    stream = model.stream_generate([5], **LONG)
    next(stream)
    outcome: list[ModelClosedError] = []

    def wait_for_reply() -> None:
        try:
            model.batch_generate([[5]] * 40, **LONG)
        except ModelClosedError as error:
            outcome.append(error)

    waiting = threading.Thread(target=wait_for_reply)
    waiting.start()
    assert eventually(lambda: engine_of(model).num_free_slots == 0)
    model.close()
    waiting.join(timeout=20)
    assert not waiting.is_alive()
    assert [error.hint != "" for error in outcome] == [True]
    with pytest.raises(ModelClosedError):
        list(stream)
    outcome.clear()
    gc.collect()
    assert (weight(), keys()) == (None, None)
    assert engine_threads() == before


def test_a_closed_model_says_so_and_closes_again(small_folder_path: Path) -> None:
    with open_model(small_folder_path) as model:
        pass
    model.close()
    calls: list[Callable[[], object]] = [
        lambda: model.generate(PROMPT),
        lambda: model.chat(MESSAGES),
        lambda: model.stream_generate(PROMPT),
        lambda: model.batch_generate([PROMPT]),
        lambda: model.logits([5]),
        lambda: model.score([5, 6]),
        lambda: asyncio.run(model.agenerate(PROMPT)),
    ]
    for call in calls:
        with pytest.raises(ModelClosedError, match="closed") as caught:
            call()
        assert "from_pretrained" in caught.value.hint
    assert model.render(MESSAGES).text.startswith("<|begin_of_sentence|>")


def test_a_dropped_model_stops_its_engine(small_folder_path: Path) -> None:
    before = engine_threads()
    model = open_model(small_folder_path)
    assert model.generate([5], max_new_tokens=2).token_ids
    assert len(engine_threads() - before) == 1
    del model
    gc.collect()
    assert eventually(lambda: engine_threads() == before)
