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


@pytest.mark.parametrize("replies", ["one text", ["a", 5]])
def test_replies_that_are_no_list_of_texts(replies: Any) -> None:
    with pytest.raises(InvalidRequestError, match="list of texts"):
        scripted_model(replies)


def test_a_scripted_model_says_what_it_is() -> None:
    with scripted_model([]) as model:
        assert repr(model).startswith("<ErnieModel 'scripted'")
    assert repr(model).endswith(", closed>")
