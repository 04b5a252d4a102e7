"""A program that uses ernie45 as its users do; test_wheel.py type-checks it and never runs it."""

from collections.abc import Iterator

from typing_extensions import assert_type

from ernie45 import (
    ChatCompletion,
    Completion,
    CompletionChunk,
    ErnieError,
    ErnieModel,
    Message,
    SamplingOptions,
    Usage,
)


def ask(question: str) -> str:
    options: SamplingOptions = {"temperature": 0.0, "max_new_tokens": 20}
    messages: list[Message] = [{"role": "user", "content": question}]
    try:
        with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
            reply = model.chat(messages, **options)
            assert_type(reply, ChatCompletion)
            assert_type(reply.usage, Usage)
            return reply.text
    except ErnieError as error:
        assert_type(error.hint, str)
        return error.message


def complete(model: ErnieModel, prompts: list[str]) -> Iterator[str]:
    assert_type(model.batch_generate(prompts, seed=1), list[Completion])
    for chunk in model.stream_generate(prompts[0], temperature=0.8):
        assert_type(chunk, CompletionChunk)
        yield chunk.text
