from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ernie45 import InvalidRequestError, ModelClosedError, UnsupportedError
from ernie45.testing import scripted_model

MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
ANSWER = "2 + 2 = 4. 你好 😀"


def test_replies_come_in_order_with_the_exact_text() -> None:
    model = scripted_model([ANSWER, "second", ""])
    first = model.chat(MESSAGES)
    assert (first.text, first.finish_reason) == (ANSWER, "stop")
    assert first.token_ids == tuple(model.tokenizer.encode(ANSWER))
    assert first.usage.prompt_tokens == len(model.render(MESSAGES))
    assert model.generate("x").text == "second"
    assert (model.generate("x").text, first.message) == ("", {"role": "assistant", "content": ANSWER})


def test_replies_stream_token_by_token() -> None:
    model = scripted_model([ANSWER, ANSWER])
    chunks = list(model.stream_chat(MESSAGES))
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    assert len(chunks) == len(model.tokenizer.encode(ANSWER)) + 1

    async def read() -> str:
        return "".join([chunk.text async for chunk in model.astream_chat(MESSAGES)])

    assert asyncio.run(read()) == ANSWER


def test_a_batch_is_answered_in_order() -> None:
    replies = [str(number) for number in range(5)]
    assert [done.text for done in scripted_model(replies).batch_chat([MESSAGES] * 5)] == replies


def test_options_count_as_with_a_real_model() -> None:
    model = scripted_model([ANSWER, ANSWER])
    stopped = model.chat(MESSAGES, stop="= 4")
    assert (stopped.text, stopped.finish_reason) == ("2 + 2 ", "stop")
    cut = model.chat(MESSAGES, max_new_tokens=2)
    assert (len(cut.token_ids), cut.finish_reason) == (2, "length")
    options: dict[str, Any] = {"temperature": -1}
    with pytest.raises(InvalidRequestError, match="temperature"):
        model.chat(MESSAGES, **options)
    with pytest.raises(InvalidRequestError, match="robot"):
        model.chat([{"role": "robot", "content": "beep"}])


def test_what_a_script_cannot_do() -> None:
    model = scripted_model(["only one"])
    with pytest.raises(UnsupportedError, match="no logits"):
        model.logits("x")
    model.chat(MESSAGES)
    with pytest.raises(InvalidRequestError, match="no reply for request 2"):
        model.chat(MESSAGES)
    model.close()
    with pytest.raises(ModelClosedError):
        model.chat(MESSAGES)


# A script that thinks

THOUGHT = "2 + 2 = 4, 好"
SAID = [
    f"{THOUGHT}\n</think>\n\n<response>\n{ANSWER}\n</response>\n",
    f"{THOUGHT}\n</think>\n\n{ANSWER}",
    f"<think>\n{THOUGHT}\n</think>\n<response>\n{ANSWER}\n</response>",
]


def test_a_scripted_reply_may_think() -> None:
    first, second, third = scripted_model(SAID, thinking=True).batch_chat([MESSAGES] * 3)
    for reply in (first, second, third):
        assert (reply.text, reply.reasoning, str(reply)) == (ANSWER, THOUGHT, ANSWER)
        assert reply.message == {"role": "assistant", "content": ANSWER, "thoughts": THOUGHT}


@pytest.mark.parametrize("said", SAID)
def test_every_way_to_chat_tells_reasoning_and_answer_apart(said: str) -> None:
    model = scripted_model([said] * 6, thinking=True)
    expected = model.chat(MESSAGES, thinking=True)

    async def twins() -> list[Any]:
        chunks = [chunk async for chunk in model.astream_chat(MESSAGES, thinking=True)]
        batch = await model.abatch_chat([MESSAGES, MESSAGES], thinking=True)
        return [await model.achat(MESSAGES, thinking=True), *batch, chunks]

    *replies, achunks = asyncio.run(twins())
    assert replies == [expected] * 3
    for chunks in (list(model.stream_chat(MESSAGES)), achunks):
        assert "".join(chunk.reasoning for chunk in chunks) == expected.reasoning == THOUGHT
        assert "".join(chunk.text for chunk in chunks) == expected.text == ANSWER
        kinds = [bool(chunk.text) for chunk in chunks if chunk.text or chunk.reasoning]
        assert kinds == sorted(kinds), "reasoning comes first"
        assert tuple(token_id for chunk in chunks for token_id in chunk.token_ids) == expected.token_ids


def test_a_completion_of_the_same_prompt_is_not_taken_apart() -> None:
    model = scripted_model([SAID[0]] * 2, thinking=True)
    prompt = model.render(MESSAGES, thinking=True)
    assert prompt.text.endswith("Assistant: \n<think>\n")
    assert model.generate(prompt).text == SAID[0]
    assert "".join(chunk.text for chunk in model.stream_generate(prompt)) == SAID[0]


def test_the_history_goes_on_without_the_reasoning() -> None:
    model = scripted_model([SAID[0]], thinking=True)
    history: list[Any] = [*MESSAGES, model.chat(MESSAGES).message, {"role": "user", "content": "Sure?"}]
    text = model.render(history).text
    assert ANSWER in text
    assert THOUGHT not in text


def test_a_stop_text_ends_the_answer_and_not_the_reasoning() -> None:
    reply = scripted_model([SAID[0]], thinking=True).chat(MESSAGES, stop="= 4")
    assert (reply.reasoning, reply.text, reply.finish_reason) == (THOUGHT, "2 + 2 ", "stop")


def test_a_reply_cut_while_thinking_is_all_reasoning() -> None:
    reply = scripted_model([SAID[0]], thinking=True).chat(MESSAGES, max_new_tokens=2)
    assert (reply.text, reply.finish_reason) == ("", "length")
    assert reply.reasoning
    assert THOUGHT.startswith(reply.reasoning)


def test_a_thinking_budget_counts_tokens_of_reasoning() -> None:
    model = scripted_model([SAID[0]] * 4, thinking=True)
    ids = model.tokenizer.encode(THOUGHT)
    for budget in (0, 2, len(ids) + 10):
        reply = model.chat(MESSAGES, thinking_budget=budget)
        assert (reply.reasoning, reply.text) == (model.tokenizer.decode(ids[:budget]).rstrip("\ufffd"), ANSWER)
    chunks = model.stream_chat(MESSAGES, thinking_budget=0)
    assert "".join(chunk.reasoning for chunk in chunks) == ""


def test_what_cannot_be_asked_of_a_checkpoint() -> None:
    thinks, does_not = scripted_model([], thinking=True), scripted_model([])
    with pytest.raises(UnsupportedError, match="always thinks"):
        thinks.chat(MESSAGES, thinking=False)
    with pytest.raises(UnsupportedError, match="does not think"):
        does_not.stream_chat(MESSAGES, thinking=True)
    for budget in (0, 100):
        with pytest.raises(UnsupportedError, match="thinking_budget") as caught:
            does_not.batch_chat([MESSAGES], thinking_budget=budget)
        assert caught.value.hint
    with pytest.raises(InvalidRequestError, match="thinking_budget must be at least 0, not -1"):
        thinks.chat(MESSAGES, thinking_budget=-1)
    unknown: dict[str, Any] = {"thinking_budget": 5}
    with pytest.raises(InvalidRequestError, match="no option 'thinking_budget'"):
        thinks.generate("x", **unknown)


@pytest.mark.parametrize("replies", ["one text", ["a", 5]])
def test_replies_that_are_no_list_of_texts(replies: Any) -> None:
    with pytest.raises(InvalidRequestError, match="list of texts"):
        scripted_model(replies)


def test_a_scripted_model_says_what_it_is() -> None:
    with scripted_model([]) as model:
        assert repr(model).startswith("<ErnieModel 'scripted'")
    assert repr(model).endswith(", closed>")
