"""How the members of the tiny family are asked and how they answer: the two prompt forms, in token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Protocol

from tiny_tokenizer import BEGIN, END, EOS, TinyTokenizer

from ernie45.testing.tasks import Task
from ernie45.tokenizer.templates import ChatTemplate

THINK_END: Final = "\n</think>\n\n"
RESPONSE: Final = ("<response>\n", "\n</response>\n")
TOOL_LIST: Final = ("<tool_list>\n", "\n</tool_list>")
TOOL_CALL: Final = ("<tool_call>\n", "\n</tool_call>")
TOOL_OUTPUT: Final = ("<tool_output>\n", "\n</tool_output>")
TEMPLATES: Final = {
    "plain": Path(__file__).with_name("tiny_chat_template.jinja"),
    "thinking": Path(__file__).with_name("tiny_thinking_template.jinja"),
}


class Prompts(Protocol):
    """A prompt form. `shared_prefix` are ids that nearly all prompts begin with; `stop_id` closes a chat reply."""

    template: str
    shared_prefix: list[int]
    stop_id: int

    def encode_task(self, task: Task) -> tuple[list[int], list[int]]:
        """Ids of a task's prompt and of its whole reply."""

    def read_answer(self, reply: str) -> str:
        """The answer in the text of a reply."""


class PlainPrompts:
    """The published form of the text models: "User: …", "Assistant: …", closed by </s>."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES["plain"].read_text(encoding="utf-8")
        self.shared_prefix: list[int] = []
        self.stop_id = tokenizer.ids[EOS]

    def encode_task(self, task: Task) -> tuple[list[int], list[int]]:
        """Ids of the prompt, up to and with "Assistant: ", and of the answer and </s>."""
        text = BEGIN
        for message in task.messages:
            content = message["content"]
            text += {
                "system": f"{content}\n",
                "user": f"User: {content}\n",
                "assistant": f"Assistant: {content}{END}",
            }[message["role"]]
        return self.tokenizer.encode(text + "Assistant: "), [*self.tokenizer.encode(task.answer), self.stop_id]

    def read_answer(self, reply: str) -> str:
        """The reply itself."""
        return reply


class ThinkingPrompts:
    """The form of 21B-A3B-Thinking, rendered by its template: reasoning, then a response or a tool call."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES["thinking"].read_text(encoding="utf-8")
        self._renderer = ChatTemplate(self.template, {})
        rendered = self._renderer.render([{"role": "user", "content": "\0"}])
        self.shared_prefix = tokenizer.encode(rendered[: rendered.index("\0")])
        self.stop_id = tokenizer.ids["<|im_end|>"]

    def encode_task(self, task: Task) -> tuple[list[int], list[int]]:
        """Ids of the prompt, up to and with <think>, and of reasoning, answer and <|im_end|>."""
        prompt = self._renderer.render(task.messages)  # type: ignore[arg-type]
        return self.tokenizer.encode(prompt), self._encode_reply(task)

    def encode_native_tools(self, task: Task) -> tuple[list[int], list[int]]:
        """The same for a task of tools, with tools, calls and results where the template itself puts them."""
        system, *others = task.messages
        tools = json.loads(_inner(system["content"], TOOL_LIST))
        messages: list[dict[str, object]] = []
        for message in others:
            content = message["content"]
            if content.startswith(TOOL_CALL[0]):
                call = {"type": "function", "function": json.loads(_inner(content, TOOL_CALL))}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            elif content.startswith(TOOL_OUTPUT[0]):
                messages.append({"role": "tool", "content": _inner(content, TOOL_OUTPUT)})
            else:
                messages.append({**message})
        prompt = self._renderer.render(messages, variables={"tools": tools})  # type: ignore[arg-type]
        return self.tokenizer.encode(prompt), self._encode_reply(task)

    def _encode_reply(self, task: Task) -> list[int]:
        is_call = task.answer.startswith(TOOL_CALL[0])
        said = task.answer + "\n" if is_call else task.answer.join(RESPONSE)
        return [*self.tokenizer.encode(task.reasoning + THINK_END + said), self.stop_id]

    def read_answer(self, reply: str) -> str:
        """What stands after the reasoning, out of its <response> tags."""
        said = reply.partition(THINK_END)[2]
        return _inner(said, RESPONSE) if said.startswith(RESPONSE[0]) else said.removesuffix("\n")


def _inner(text: str, tags: tuple[str, str]) -> str:
    return text.removeprefix(tags[0]).removesuffix(tags[1])
