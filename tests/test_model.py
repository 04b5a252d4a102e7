from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel, InvalidRequestError, Prompt, RoutingTrace, UnsupportedError

PROMPT = "the cat sat on"
MESSAGES = [{"role": "user", "content": "the cat"}]
CONVERSATION = [*MESSAGES, {"role": "assistant", "content": "a hat"}, {"role": "user", "content": "你好"}]
HOT: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "ignore_eos": True}


def open_model(folder: Path, **options: Any) -> ErnieModel:
    return ErnieModel.from_pretrained(folder, device="cpu", progress=False, **options)


def without_times(result: Any) -> Any:
    """The result less what no two runs have in common: times, what was taken over from the run before, and the last
    digits of log-probabilities."""
    usage = dataclasses.replace(
        result.usage, cached_tokens=0, seconds=0.0, seconds_to_first_token=None, tokens_per_second=None
    )
    return dataclasses.replace(result, usage=usage, logprobs=None)


def values(logprobs: Any) -> list[float]:
    return [value for entry in logprobs for value in (entry.logprob, *(top for _, top in entry.top))]


# One reply, however it is asked for


def test_every_way_to_complete_gives_the_same_reply(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {**HOT, "seed": 11, "max_new_tokens": 20, "logprobs": 2}
    expected = small_model.generate(PROMPT, **options)
    assert len(expected.token_ids) == 20

    async def twins() -> list[Any]:
        chunks = [chunk async for chunk in small_model.astream_generate(PROMPT, **options)]
        return [
            await small_model.agenerate(PROMPT, **options),
            *await small_model.abatch_generate([PROMPT, "other", PROMPT], **options),
            chunks,
        ]

    alone, first, _, third, achunks = asyncio.run(twins())
    chunks = list(small_model.stream_generate(PROMPT, **options))
    batch = small_model.batch_generate(["a hat", PROMPT, PROMPT], **options)
    for reply in (alone, first, third, batch[1], batch[2]):
        assert without_times(reply) == without_times(expected)
        assert values(reply.logprobs) == pytest.approx(values(expected.logprobs), abs=1e-4)
    for pieces in (chunks, achunks):
        assert "".join(chunk.text for chunk in pieces) == expected.text
        assert tuple(i for chunk in pieces for i in chunk.token_ids) == expected.token_ids
        logprobs = [entry for chunk in pieces for entry in chunk.logprobs]
        assert values(logprobs) == pytest.approx(values(expected.logprobs), abs=1e-4)
        assert [chunk.finish_reason for chunk in pieces] == [None] * 19 + ["length"]


def test_every_way_to_chat_gives_the_same_reply(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {**HOT, "seed": 5, "max_new_tokens": 12}
    expected = small_model.chat(CONVERSATION, **options)

    async def twins() -> list[Any]:
        chunks = [chunk async for chunk in small_model.astream_chat(CONVERSATION, **options)]
        return [
            await small_model.achat(CONVERSATION, **options),
            *await small_model.abatch_chat([MESSAGES, CONVERSATION], **options),
            chunks,
        ]

    alone, _, second, achunks = asyncio.run(twins())
    batch = small_model.batch_chat([CONVERSATION, MESSAGES], **options)
    for reply in (alone, second, batch[0]):
        assert without_times(reply) == without_times(expected)
    assert batch[1].token_ids != expected.token_ids
    for pieces in (list(small_model.stream_chat(CONVERSATION, **options)), achunks):
        assert "".join(chunk.text for chunk in pieces) == expected.text
        assert tuple(i for chunk in pieces for i in chunk.token_ids) == expected.token_ids
        assert pieces[-1].finish_reason == expected.finish_reason == "length"
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.completion_tokens == 12
    assert expected.message == {"role": "assistant", "content": expected.text}
    assert (expected.reasoning, expected.tool_calls) == (None, ())


def test_chat_sends_what_render_shows(small_model: ErnieModel) -> None:
    prompt = small_model.render(CONVERSATION)
    assert prompt.text == (
        "<|begin_of_sentence|>User: the cat\nAssistant: a hat<|end_of_sentence|>User: 你好\nAssistant: "
    )
    assert list(prompt.token_ids) == small_model.tokenizer.encode(prompt.text)
    options: dict[str, Any] = {**HOT, "seed": 5, "max_new_tokens": 6}
    reply = small_model.chat(CONVERSATION, **options)
    assert reply.token_ids == small_model.generate(prompt, **options).token_ids
    assert reply.usage.prompt_tokens == len(prompt)


def test_a_prompt_may_be_text_ids_or_rendered(small_model: ErnieModel) -> None:
    ids = small_model.tokenizer.encode(PROMPT)
    options: dict[str, Any] = {**HOT, "seed": 1, "max_new_tokens": 8}
    by_text = small_model.generate(PROMPT, **options)
    for prompt in (ids, tuple(ids), Prompt(text=PROMPT, token_ids=tuple(ids))):
        assert without_times(small_model.generate(prompt, **options)) == without_times(by_text)
    assert str(by_text) == by_text.text == small_model.tokenizer.decode(by_text.token_ids)


def test_a_batch_item_may_have_options_of_its_own(small_model: ErnieModel) -> None:
    items: list[Any] = [PROMPT, {"prompt": PROMPT, "seed": 2}, {"prompt": [5, 6], "max_new_tokens": 3}]
    shared: dict[str, Any] = {**HOT, "seed": 1, "max_new_tokens": 9}
    first, second, third = small_model.batch_generate(items, **shared)
    assert first.token_ids == small_model.generate(PROMPT, **shared).token_ids
    assert second.token_ids == small_model.generate(PROMPT, **{**shared, "seed": 2}).token_ids
    assert first.token_ids != second.token_ids
    assert third.usage.completion_tokens == 3
    assert items[1] == {"prompt": PROMPT, "seed": 2}


# Thinking


def test_a_budget_ends_the_reasoning_of_a_real_model(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}<think>\n")
    with open_model(folder) as model, pytest.raises(UnsupportedError, match="</think> to be one token") as caught:
        model.chat(MESSAGES, thinking_budget=3)
    assert "max_new_tokens" in caught.value.hint

    end_id = model.tokenizer.size
    (folder / "added_tokens.json").write_text(json.dumps({"</think>": end_id}))
    for registered in ({}, {"additional_special_tokens": ["</think>"]}):
        (folder / "special_tokens_map.json").write_text(json.dumps(registered))
        with open_model(folder) as model:
            options: dict[str, Any] = {**HOT, "seed": 3, "max_new_tokens": 30, "logit_bias": {end_id: -100}}
            free = model.chat(MESSAGES, **options)
            assert (free.text, bool(free.reasoning)) == ("", True)
            short, none = (model.chat(MESSAGES, thinking_budget=budget, **options) for budget in (6, 0))
            closing = tuple(model.tokenizer.encode("\n</think>\n\n"))
            assert short.token_ids[:10] == (*free.token_ids[:6], *closing)
            assert short.reasoning == model.tokenizer.decode(free.token_ids[:6]).strip("\n")
            assert short.text == model.tokenizer.decode(short.token_ids[10:]).strip("\n")
            assert (none.token_ids[:4], none.reasoning) == (closing, "")
            assert none.usage.completion_tokens == short.usage.completion_tokens == 30
            mixed = [model.stream_chat(MESSAGES, thinking_budget=budget, **options) for budget in (6, 0, None)]
            ids = [tuple(token_id for chunk in stream for token_id in chunk.token_ids) for stream in mixed]
            assert ids == [short.token_ids, none.token_ids, free.token_ids]


# Where a reply ends


def test_a_stop_text_over_token_borders_cuts_the_reply(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {**HOT, "seed": 4, "max_new_tokens": 40}
    whole = small_model.generate(PROMPT, **options)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 6]
    assert stop not in {small_model.tokenizer.decode([i]) for i in whole.token_ids}
    cut = whole.text[: whole.text.index(stop)]

    reply = small_model.generate(PROMPT, stop=stop, **options)
    assert (reply.text, reply.finish_reason) == (cut, "stop")
    assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
    assert stop in small_model.tokenizer.decode(reply.token_ids)
    assert reply.usage.completion_tokens == len(reply.token_ids) < 40

    chunks = list(small_model.stream_generate(PROMPT, stop=["never in there", stop], **options))
    assert "".join(chunk.text for chunk in chunks) == cut
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * len(reply.token_ids)
    assert chunks[-1].finish_reason == "stop"


def test_a_stop_text_that_never_comes_leaves_the_text_whole(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {**HOT, "seed": 4, "max_new_tokens": 40}
    whole = small_model.generate(PROMPT, **options)
    reply = small_model.generate(PROMPT, stop=whole.text[-4:] + "!", **options)
    assert (reply.text, reply.finish_reason) == (whole.text, "length")


def test_stop_token_ids_end_the_reply(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {**HOT, "seed": 4, "max_new_tokens": 40}
    whole = small_model.generate(PROMPT, **options)
    end = whole.token_ids[9]
    index = whole.token_ids.index(end)
    reply = small_model.generate(PROMPT, stop_token_ids=[383, end], **options)
    assert (reply.token_ids, reply.finish_reason) == (whole.token_ids[: index + 1], "stop")
    assert reply.text == small_model.tokenizer.decode(whole.token_ids[:index])


def test_ignore_eos_goes_on(small_model: ErnieModel) -> None:
    always_end: dict[str, Any] = {"temperature": 0, "logit_bias": {2: 100.0}, "max_new_tokens": 5}
    reply = small_model.generate(PROMPT, **always_end)
    assert (reply.token_ids, reply.finish_reason) == ((2,), "stop")
    reply = small_model.generate(PROMPT, ignore_eos=True, **always_end)
    assert (reply.token_ids, reply.finish_reason) == ((2,) * 5, "length")


def test_without_max_new_tokens_the_context_is_the_limit(small_model: ErnieModel) -> None:
    reply = small_model.generate([7] * 250, temperature=0, ignore_eos=True)
    assert (len(reply.token_ids), reply.finish_reason) == (6, "length")
    reply = small_model.generate([7] * 255, temperature=0, ignore_eos=True, max_new_tokens=1)
    assert reply.usage.total_tokens == 256


def test_without_max_new_tokens_512_is_the_limit(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, max_position_embeddings=1024, num_hidden_layers=1)
    with open_model(folder) as model:
        assert model.generate([7, 8], temperature=0, ignore_eos=True).usage.completion_tokens == 512


# What is reported


def test_usage_counts_tokens_and_seconds(small_model: ErnieModel) -> None:
    started = time.perf_counter()
    usage = small_model.generate(PROMPT, **HOT, max_new_tokens=10).usage
    elapsed = time.perf_counter() - started
    assert usage.prompt_tokens == len(small_model.tokenizer.encode(PROMPT))
    assert (usage.completion_tokens, usage.total_tokens) == (10, usage.prompt_tokens + 10)
    assert usage.seconds_to_first_token is not None
    assert 0 < usage.seconds_to_first_token < usage.seconds <= elapsed
    assert usage.tokens_per_second == pytest.approx(9 / (usage.seconds - usage.seconds_to_first_token))
    assert small_model.generate(PROMPT, max_new_tokens=1).usage.tokens_per_second is None


def test_only_the_last_chunk_has_the_usage(small_model: ErnieModel) -> None:
    chunks = list(small_model.stream_generate(PROMPT, **HOT, max_new_tokens=4))
    assert [chunk.usage is None for chunk in chunks] == [True, True, True, False]


def test_a_chunk_comes_for_every_step_also_while_text_is_held_back(small_model: ErnieModel) -> None:
    face = small_model.tokenizer.encode("😀")
    assert len(face) == 4  # a token for each of its bytes, and no part of it can be shown
    chunks = list(small_model.stream_generate(PROMPT, temperature=0, logit_bias={face[0]: 100.0}, max_new_tokens=3))
    assert [chunk.token_ids for chunk in chunks] == [(face[0],)] * 3
    assert chunks[0].text == ""
    assert "".join(chunk.text for chunk in chunks) == small_model.tokenizer.decode([face[0]] * 3)


def test_logprobs_are_those_of_the_raw_distribution(small_model: ErnieModel) -> None:
    ids = small_model.tokenizer.encode(PROMPT)
    reply = small_model.generate(ids, **{**HOT, "temperature": 3.0}, seed=2, max_new_tokens=9, logprobs=3)
    assert reply.logprobs is not None
    assert [entry.token_id for entry in reply.logprobs] == list(reply.token_ids)
    score = small_model.score([*ids, *reply.token_ids])
    tail = score.logprobs[-len(reply.token_ids) :]
    assert [entry.logprob for entry in reply.logprobs] == pytest.approx(list(tail), abs=1e-4)
    assert sum(entry.logprob for entry in reply.logprobs) == pytest.approx(sum(tail), abs=1e-4)

    raw = small_model.logits([*ids, *reply.token_ids]).log_softmax(-1)
    best = raw[len(ids) - 1].topk(3)
    assert [i for i, _ in reply.logprobs[0].top] == best.indices.tolist()
    assert [value for _, value in reply.logprobs[0].top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert small_model.generate(ids, max_new_tokens=2).logprobs is None


def test_the_model_describes_itself(small_folder_path: Path) -> None:
    with open_model(small_folder_path) as model:
        assert repr(model) == f"<ErnieModel {str(small_folder_path)!r}: 0.1 MB, float32 on cpu>"
        assert (model.name, model.context_tokens, model.spec.num_layers) == (str(small_folder_path), 256, 2)
    assert repr(model).endswith(", closed>")


def test_an_unknown_option_gets_a_suggestion(small_model: ErnieModel) -> None:
    options: dict[str, Any] = {"max_tokens": 5}
    calls: list[Callable[[], object]] = [
        lambda: small_model.generate(PROMPT, **options),
        lambda: small_model.stream_generate(PROMPT, **options),
        lambda: small_model.batch_generate([PROMPT], **options),
        lambda: small_model.batch_generate([{"prompt": PROMPT, **options}]),
        lambda: small_model.chat(MESSAGES, **options),
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="'max_tokens'") as caught:
            call()
        assert "did you mean 'max_new_tokens'?" in caught.value.hint
    with pytest.raises(InvalidRequestError, match="'zzz'") as caught:
        small_model.batch_generate([{"prompt": PROMPT, "zzz": 1}])
    assert "temperature" in caught.value.hint
    with pytest.raises(InvalidRequestError, match="has no 'prompt'"):
        small_model.batch_generate([{"text": PROMPT}])


def test_an_option_of_none_counts_as_left_out(small_model: ErnieModel) -> None:
    names = ("temperature", "top_p", "stop", "stop_token_ids", "logprobs", "ignore_eos", "logit_bias")
    options: dict[str, Any] = dict.fromkeys(names)
    expected = small_model.generate(PROMPT, seed=1, max_new_tokens=5)
    assert small_model.generate(PROMPT, seed=1, max_new_tokens=5, **options).token_ids == expected.token_ids


# Logits


def test_logits_of_the_positions_asked_for(small_model: ErnieModel) -> None:
    ids = [5, 30, 99, 7, 8]
    logits = small_model.logits(ids)
    assert (logits.shape, logits.dtype, logits.device.type) == ((5, 384), torch.float32, "cpu")
    assert torch.isfinite(logits).all()  # ids without a token are not masked
    for positions in ([0], [4, 1, 4], [-1], [-5, 2, -2], range(5), []):
        rows = [position % 5 for position in positions]
        torch.testing.assert_close(small_model.logits(ids, positions=positions), logits[rows], atol=1e-5, rtol=1e-5)
    greedy = small_model.generate(ids, temperature=0, max_new_tokens=1).token_ids
    assert greedy == (int(logits[-1, : small_model.tokenizer.size].argmax()),)
    torch.testing.assert_close(small_model.logits(PROMPT), small_model.logits(small_model.tokenizer.encode(PROMPT)))


def test_routing_is_traced_while_replies_stay_the_same() -> None:
    questions = [[{"role": "user", "content": f"What is {number} + 30 + 9?"}] for number in (12, 20)]
    with ErnieModel.from_pretrained("ernie45/tiny-moe", device="cpu", max_batch=2, progress=False) as model:
        expected = [reply.text for reply in model.batch_chat(questions, temperature=0)]
        with model.trace_routing() as recording:
            assert [reply.text for reply in model.batch_chat(questions, temperature=0)] == expected
            steps = recording.trace.calls
        model.chat(questions[0], temperature=0)
    trace = recording.trace
    assert isinstance(trace, RoutingTrace)
    assert len(trace.calls) == len(steps) > 0
    assert 2 in trace.calls[:, 2], "two rows decode in one step"
    assert 0 < trace.replay(4) < trace.replay(24) <= 1
