"""The template of the tiny members that reason renders what the published Thinking template does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import TemplateError
from ernie45.tokenizer import ChatTemplate

TOOLS_FOLDER = Path(__file__).parents[2] / "tools"
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {"a": [1, 2.5]}}},
    {"type": "function", "function": {"name": "time", "parameters": {}}},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": [1, None]}}}
BARE_CALL = {"name": "f", "arguments": '{"a": 1}'}


def message(role: str, content: object, **fields: object) -> Any:
    return {"role": role, "content": content, **fields}


# Any one or two of these are a conversation to render, and any three after a question.
PIECES = {
    "system": message("system", "S 'q' <b> {{ x }}"),
    "user": message("user", "你好\n😀"),
    "assistant": message("assistant", "  said\n"),
    "reasoned in content": message("assistant", "x<think>\n\nhm\n</think>\n\nanswer"),
    "reasoned with thoughts": message("assistant", "a </think> b", thoughts="\nbecause\n"),
    "called": message("assistant", "", tool_calls=[CALL, BARE_CALL]),
    "tool": message("tool", '{"t": "晴"}'),
    "tool output as user": message("user", "<tool_output>\nx\n</tool_output>"),
}
OTHERS: list[list[Any]] = [
    [message("user", "q"), message("assistant", "said", tool_calls=[BARE_CALL, CALL]), message("user", "r")],
    [message("user", "q"), message("assistant", "said", tool_calls=[CALL], thoughts=""), message("tool", "one")],
    [message("user", "q"), message("assistant", None, tool_calls=[CALL]), message("tool", "one"), message("tool", "2")],
    [message("user", "q"), message("assistant", "", tool_calls=[])],
    [message("user", "q"), {"role": "assistant", "tool_calls": [CALL]}, message("tool", {"t": ["晴", 1]})],
    [message("user", "q"), message("assistant", "a", thoughts="\n\n"), message("assistant", "b")],
    [message("user", "q"), message("assistant", "a", thoughts=7), message("assistant", "b", thoughts=None)],
    [message("user", "q"), message("assistant", "one</think>two</think>\nthree")],
    [message("user", "q"), message("assistant", "</think>"), message("assistant", "<think>\n\n</think>")],
    [message("user", "q"), message("assistant", "<think>a<think>\nb\n</think>c\n"), message("tool", "")],
    [message("user", [{"type": "text", "text": "parts"}]), message("assistant", "a", thoughts="t")],
    [message("user", "<tool_output>open"), message("assistant", "a", thoughts="t")],
    [message("user", "shut</tool_output>"), message("assistant", "a", thoughts="t")],
    [message("assistant", [{"type": "text", "text": "parts"}]), message("system", None), message("user", "")],
    [message("developer", "dropped"), message("user", "q")],
    [message("system", ""), message("system", "late")],
]
CONVERSATIONS = [
    *([PIECES[name] for name in names] for size in (1, 2) for names in itertools.product(PIECES, repeat=size)),
    *([PIECES["user"], *(PIECES[name] for name in names)] for names in itertools.product(PIECES, repeat=3)),
    *OTHERS,
]


@pytest.fixture(scope="module")
def published(shared_data: Path) -> ChatTemplate:
    source = (shared_data / "chat_templates" / "ernie45-21b-thinking.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, {})


@pytest.fixture(scope="module")
def ours() -> ChatTemplate:
    return ChatTemplate((TOOLS_FOLDER / "tiny_thinking_template.jinja").read_text(encoding="utf-8"), {})


@pytest.mark.parametrize(
    "variables",
    [{}, {"tools": TOOLS}, {"tools": TOOLS[:1], "system_settings": "T"}, {"system_settings": "T"}, {"tools": []}],
    ids=["plain", "tools", "tools and settings", "settings", "no tools"],
)
def test_renders_as_published(published: ChatTemplate, ours: ChatTemplate, variables: dict[str, object]) -> None:
    assert ours.source != published.source
    for messages in CONVERSATIONS:
        assert ours.render(messages, variables=variables) == published.render(messages, variables=variables), messages


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_always_ends_where_the_model_reasons(
    published: ChatTemplate, ours: ChatTemplate, add_generation_prompt: bool
) -> None:
    prompt = ours.render([PIECES["user"]], add_generation_prompt=add_generation_prompt)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert prompt == published.render([PIECES["user"]], add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("messages", [[], [message("system", None)], [message("system", [{"type": "text"}])]])
def test_refuses_what_the_published_template_refuses(
    published: ChatTemplate, ours: ChatTemplate, messages: list[Any]
) -> None:
    for template in (published, ours):
        with pytest.raises(TemplateError):
            template.render(messages)


def test_a_long_conversation_stays_within_the_limits(published: ChatTemplate, ours: ChatTemplate) -> None:
    messages = [PIECES["user"], PIECES["called"], PIECES["tool"], PIECES["reasoned in content"]] * 100
    assert ours.render(messages) == published.render(messages)
