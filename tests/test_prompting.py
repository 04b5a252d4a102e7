from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import InvalidRequestError, TemplateError, TokenizerError
from ernie45.prompting import Prompter
from ernie45.tokenizer import ERNIE45_TEMPLATE, ChatTemplate, load_tokenizer
from ernie45.types.prompts import Prompt


@pytest.fixture
def prompter(tokenizer_folder: Path) -> Prompter:
    return prompter_with(tokenizer_folder, ERNIE45_TEMPLATE)


def prompter_with(folder: Path, template: str) -> Prompter:
    return Prompter(tokenizer=load_tokenizer(folder), template=ChatTemplate(template, {}), vocab_size=384)


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages_are_rendered_up_to_where_the_assistant_speaks(prompter: Prompter, tokenizer_folder: Path) -> None:
    messages = [say("system", "S"), say("user", "the cat"), say("assistant", "a"), say("user", "你好")]
    prompt = prompter.from_messages(messages)
    assert prompt.text == (
        "<|begin_of_sentence|>S\nUser: the cat\nAssistant: a<|end_of_sentence|>User: 你好\nAssistant: "
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    assert list(prompt.token_ids) == tokenizer.encode(prompt.text)
    assert tokenizer.token_id("<|end_of_sentence|>") in prompt.token_ids
    assert len(prompt) == len(prompt.token_ids)


def test_text_parts_are_joined_and_a_tuple_is_as_good_as_a_list(prompter: Prompter) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    expected = prompter.from_messages([say("user", "the cat")])
    assert prompter.from_messages([say("user", parts)]) == expected
    assert prompter.from_messages((say("user", tuple(parts)),)) == expected
    assert prompter.from_messages([say("user", [])]) == prompter.from_messages([say("user", "")])


def test_what_a_message_holds_beside_role_and_content_is_not_dropped_unseen(prompter: Prompter) -> None:
    with pytest.raises(InvalidRequestError, match="message 0 has 'images', 'name'") as caught:
        prompter.from_messages([{**say("user", "hi"), "name": "x", "images": []}])
    assert caught.value.hint


def test_a_template_that_renders_nothing_is_an_error(tokenizer_folder: Path) -> None:
    with pytest.raises(TemplateError, match="empty") as caught:
        prompter_with(tokenizer_folder, "{# nothing #}").from_messages([say("user", "hi")])
    assert caught.value.hint


def test_a_prompt_is_taken_as_it_is(prompter: Prompter, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    by_text = prompter.from_prompt("  the cat\n")
    assert by_text == Prompt(text="  the cat\n", token_ids=tuple(tokenizer.encode("  the cat\n")))
    assert prompter.from_prompt([5, 383]) == Prompt(text="", token_ids=(5, 383))
    assert prompter.from_prompt(range(3)) == Prompt(text="", token_ids=(0, 1, 2))
    assert prompter.from_prompt(by_text) == by_text


@pytest.mark.parametrize("prompt", ["", [], [384], [-1], ["a"], [True], 5, b"ab", Prompt(text="x", token_ids=(384,))])
def test_what_is_no_prompt(prompter: Prompter, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompter.from_prompt(prompt)
    assert caught.value.hint


@pytest.mark.parametrize("messages", [[], "hi", b"hi", [say("tool", "x")], [say("user", None)], [("user", "hi")]])
def test_what_is_no_conversation(prompter: Prompter, messages: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompter.from_messages(messages)
    assert caught.value.hint


def test_a_picture_is_named_as_what_this_model_cannot_read(prompter: Prompter) -> None:
    image = {"type": "image", "image": "cat.png"}
    with pytest.raises(InvalidRequestError, match=r"message 1 has a part of type 'image'"):
        prompter.from_messages([say("user", "hi"), say("user", [{"type": "text", "text": "see"}, image])])


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2)])
def test_without_a_tokenizer_ids_pass_and_text_does_not(prompt: Sequence[int]) -> None:
    prompter = Prompter(tokenizer=None, template=None, vocab_size=10)
    assert prompter.from_prompt(prompt) == Prompt(text="", token_ids=(1, 2))
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        prompter.from_prompt("text")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        prompter.from_messages([say("user", "hi")])
