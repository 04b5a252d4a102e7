"""Messages, text and ids to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import InvalidRequestError, TemplateError, TokenizerError, UnsupportedError
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
    with pytest.raises(InvalidRequestError, match="this model reads text only") as caught:
        prompter.from_messages([say("user", "hi"), say("user", [{"type": "text", "text": "see"}, image])])
    assert "vision-language" in caught.value.hint


def test_what_marks_pictures_elsewhere_is_text_for_a_model_that_reads_text_only(prompter: Prompter) -> None:
    assert "<|IMAGE_START|>" in prompter.from_messages([say("user", "What is <|IMAGE_START|>?")]).text


# Thinking

SYSTEM = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
OPEN = "<|im_start|>assistant\n<think>\n"


@pytest.fixture
def thinker(tokenizer_folder: Path, shared_data: Path) -> Prompter:
    """Renders as 21B-A3B-Thinking does."""
    source = (shared_data / "chat_templates" / "ernie45-21b-thinking.jinja").read_text()
    return prompter_with(tokenizer_folder, source)


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n\n"


def answered(text: str, thoughts: str | None = None) -> dict[str, Any]:
    return {**say("assistant", text), **({} if thoughts is None else {"thoughts": thoughts})}


def response(text: str) -> str:
    return f"<response>\n{text}\n</response>\n"


def test_old_reasoning_is_dropped_from_the_history(thinker: Prompter) -> None:
    messages = [say("user", "q"), answered("a", "because"), say("user", "p"), answered("b", "since"), say("user", "r")]
    prompt = thinker.from_messages(messages)
    history = [turn("user", "q"), turn("assistant", response("a")), turn("user", "p"), turn("assistant", response("b"))]
    assert prompt.text == SYSTEM + "".join(history) + turn("user", "r") + OPEN
    assert prompt.thinking


def test_reasoning_since_the_last_question_is_kept(thinker: Prompter) -> None:
    result = "<tool_output>\n20\n</tool_output>"
    messages = [say("user", "p"), answered("x", "old"), say("user", "q"), answered("call", "why"), say("user", result)]
    assert thinker.from_messages(messages).text == SYSTEM + "".join(
        [
            turn("user", "p"),
            turn("assistant", response("x")),
            turn("user", "q"),
            turn("assistant", "<think>\nwhy\n</think>\n" + response("call")),
            turn("user", result),
            OPEN,
        ]
    )


def test_a_system_text_stands_in_the_settings(thinker: Prompter) -> None:
    text = thinker.from_messages([say("system", "Be brief."), say("user", "q")]).text
    settings = "<system_setting>\nBe brief.\n</system_setting>\n\n<global_setting>\nthink_mode=True\n</global_setting>"
    assert text == turn("system", settings) + turn("user", "q") + OPEN


@pytest.mark.parametrize(
    ("raw", "text", "thoughts"),
    [
        ("why\n</think>\n\n<response>\na\n</response>\n", "a", "why"),
        ("<think>\nwhy\n</think>\n\na", "a", "why"),
        ("<response>\na\n</response>", "a", ""),
        ("\n<think>\ncut off", "", "cut off"),
        ("Write <think> and <response>.", "Write <think> and <response>.", None),
    ],
)
def test_a_raw_reply_in_the_history_is_taken_apart(thinker: Prompter, raw: str, text: str, thoughts: str) -> None:
    for later in ([], [say("user", "again")]):
        given = thinker.from_messages([say("user", "q"), answered(raw), *later])
        assert given == thinker.from_messages([say("user", "q"), answered(text, thoughts), *later])
        assert given.text.count("<response>") <= 1 + raw.count("Write")


def test_content_beside_thoughts_is_an_answer_as_it_is(thinker: Prompter) -> None:
    content = "The tag </think> ends it."
    text = thinker.from_messages([say("user", "q"), answered(content, ""), say("user", "r")]).text
    assert turn("assistant", response(content)) in text


def test_a_template_that_knows_no_reasoning_leaves_it_out_and_content_alone(prompter: Prompter) -> None:
    raw = "why\n</think>\n\n<response>\na\n</response>\n"
    assert f"Assistant: {raw}<|end_of_sentence|>" in prompter.from_messages([answered(raw), say("user", "x")]).text
    plain = prompter.from_messages([answered("a"), say("user", "x")])
    assert prompter.from_messages([answered("a", "why"), say("user", "x")]) == plain
    assert not plain.thinking


def test_thoughts_of_none_are_no_thoughts(thinker: Prompter) -> None:
    messages = [say("user", "q"), answered("a")]
    assert thinker.from_messages([messages[0], {**messages[1], "thoughts": None}]) == thinker.from_messages(messages)


@pytest.mark.parametrize("message", [{**say("user", "hi"), "thoughts": "hm"}, {**say("assistant", "a"), "thoughts": 3}])
def test_thoughts_are_text_of_an_assistant(thinker: Prompter, message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"message 0, of role '(user|assistant)', has the thoughts") as caught:
        thinker.from_messages([message, say("user", "x")])
    assert caught.value.hint


def test_thinking_follows_the_checkpoint_and_the_impossible_is_refused(prompter: Prompter, thinker: Prompter) -> None:
    messages = [say("user", "q")]
    assert thinker.from_messages(messages, thinking=True) == thinker.from_messages(messages, thinking=None)
    assert prompter.from_messages(messages, thinking=False) == prompter.from_messages(messages)
    with pytest.raises(UnsupportedError, match="always thinks") as caught:
        thinker.from_messages(messages, thinking=False)
    assert "thinking_budget=0" in caught.value.hint
    with pytest.raises(UnsupportedError, match="does not think") as caught:
        prompter.from_messages(messages, thinking=True)
    assert "21B-A3B-Thinking" in caught.value.hint
    options: dict[str, Any] = {"thinking": "yes"}
    with pytest.raises(InvalidRequestError, match="thinking must be True, False or None, not 'yes'"):
        prompter.from_messages(messages, **options)


def test_a_template_with_a_switch_is_told(tokenizer_folder: Path) -> None:
    switch = "{{ '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n' }}"
    prompter = prompter_with(tokenizer_folder, switch)
    messages = [say("user", "q")]
    assert [prompter.from_messages(messages, thinking=asked).thinking for asked in (None, False, True)] == [
        False,
        False,
        True,
    ]


def test_a_rendered_prompt_given_for_completion_is_plain_text(thinker: Prompter) -> None:
    prompt = thinker.from_messages([say("user", "q")])
    taken = thinker.from_prompt(prompt)
    assert (taken.text, taken.token_ids, taken.thinking) == (prompt.text, prompt.token_ids, False)


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2)])
def test_without_a_tokenizer_ids_pass_and_text_does_not(prompt: Sequence[int]) -> None:
    prompter = Prompter(tokenizer=None, template=None, vocab_size=10)
    assert prompter.from_prompt(prompt) == Prompt(text="", token_ids=(1, 2))
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        prompter.from_prompt("text")
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        prompter.from_messages([say("user", "hi")])
