"""How the members of the tiny family are asked and how they answer: the prompt forms, in token ids."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from tiny_media import prepare
from tiny_tokenizer import BEGIN, END, EOS, TinyTokenizer

from ernie45.testing.tasks import Task
from ernie45.tokenizer.templates import ChatTemplate
from ernie45.types.media import Media, PlacedMedia

THINK_END: Final = "\n</think>\n\n"
RESPONSE: Final = ("<response>\n", "\n</response>\n")
TOOL_LIST: Final = ("<tool_list>\n", "\n</tool_list>")
TOOL_CALL: Final = ("<tool_call>\n", "\n</tool_call>")
TOOL_OUTPUT: Final = ("<tool_output>\n", "\n</tool_output>")
TEMPLATES: Final = {
    "plain": Path(__file__).with_name("tiny_chat_template.jinja"),
    "thinking": Path(__file__).with_name("tiny_thinking_template.jinja"),
    "pictures": Path(__file__).with_name("tiny_vl_template.jinja"),
}
THINKING_SHARE: Final = 0.1
STAMPED_SHARE: Final = 0.5
PLACEHOLDERS: Final = {"image": "<|IMAGE_PLACEHOLDER|>", "video": "<|VIDEO_PLACEHOLDER|>"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A task in token ids: its prompt, the whole reply, and the pictures and clips that stand in the prompt."""

    prompt: list[int]
    reply: list[int]
    placed: tuple[PlacedMedia, ...] = ()


class Prompts(Protocol):
    """A prompt form. `shared_prefix` are ids that nearly all prompts begin with; `stop_id` closes a chat reply."""

    template: str
    shared_prefix: list[int]
    stop_id: int

    def encode_task(self, task: Task) -> Encoded:
        """A task's prompt and its whole reply."""

    def read_answer(self, reply: str) -> str:
        """The answer in the text of a reply."""


class PlainPrompts:
    """The published form of the text models: "User: …", "Assistant: …", closed by </s>."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES["plain"].read_text(encoding="utf-8")
        self.shared_prefix: list[int] = []
        self.stop_id = tokenizer.ids[EOS]

    def encode_task(self, task: Task) -> Encoded:
        """The prompt, up to and with "Assistant: ", and the answer and </s>."""
        text = BEGIN
        for message in task.messages:
            content = message["content"]
            text += {
                "system": f"{content}\n",
                "user": f"User: {content}\n",
                "assistant": f"Assistant: {content}{END}",
            }[message["role"]]
        reply = [*self.tokenizer.encode(task.answer), self.stop_id]
        return Encoded(prompt=self.tokenizer.encode(text + "Assistant: "), reply=reply)

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

    def encode_task(self, task: Task) -> Encoded:
        """The prompt, up to and with <think>, and the reasoning, answer and <|im_end|>."""
        prompt = self._renderer.render(task.messages)  # type: ignore[arg-type]
        return Encoded(prompt=self.tokenizer.encode(prompt), reply=self._encode_reply(task))

    def encode_native_tools(self, task: Task) -> Encoded:
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
        return Encoded(prompt=self.tokenizer.encode(prompt), reply=self._encode_reply(task))

    def _encode_reply(self, task: Task) -> list[int]:
        is_call = task.answer.startswith(TOOL_CALL[0])
        said = task.answer + "\n" if is_call else task.answer.join(RESPONSE)
        return [*self.tokenizer.encode(task.reasoning + THINK_END + said), self.stop_id]

    def read_answer(self, reply: str) -> str:
        """What stands after the reasoning, out of its <response> tags."""
        said = reply.partition(THINK_END)[2]
        return _inner(said, RESPONSE) if said.startswith(RESPONSE[0]) else said.removesuffix("\n")


class PicturePrompts:
    """The form of the vision-language models, rendered by its template: pictures and clips, reasoning on or off."""

    def __init__(self, tokenizer: TinyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = TEMPLATES["pictures"].read_text(encoding="utf-8")
        self._renderer = ChatTemplate(self.template, {})
        self.shared_prefix: list[int] = []
        self.stop_id = tokenizer.ids[EOS]

    def encode_task(self, task: Task) -> Encoded:
        """The prompt without reasoning, its clips with the time drawn on them, and the answer and </s>."""
        return self._encode(task, thinking=False, frames_per_second=2.0)

    def encode_variant(self, task: Task, rng: random.Random) -> Encoded:
        """The same for training: now and then with reasoning, and the time on some clips only."""
        thinking = rng.random() < THINKING_SHARE
        frames_per_second = rng.choice((1.0, 2.0, 4.0, 25.0)) if rng.random() < STAMPED_SHARE else None
        return self._encode(task, thinking=thinking, frames_per_second=frames_per_second)

    def _encode(self, task: Task, *, thinking: bool, frames_per_second: float | None) -> Encoded:
        prompt = self._renderer.render(task.messages, variables={"enable_thinking": thinking})  # type: ignore[arg-type]
        media = [prepare(part, frames_per_second) for part in media_parts(task)]
        said = task.reasoning + THINK_END + task.answer if thinking else task.answer
        ids, placed = self._place(self.tokenizer.encode(prompt), media)
        return Encoded(prompt=ids, reply=[*self.tokenizer.encode(said), self.stop_id], placed=placed)

    def _place(self, ids: list[int], media: list[Media]) -> tuple[list[int], tuple[PlacedMedia, ...]]:
        """The ids with each placeholder repeated for the tokens of its picture or clip."""
        placeholders = {self.tokenizer.ids[name] for name in PLACEHOLDERS.values()}
        remaining = iter(media)
        expanded: list[int] = []
        placed = []
        for token_id in ids:
            if token_id in placeholders:
                item = next(remaining)
                placed.append(PlacedMedia(first=len(expanded), media=item))
                expanded += [token_id] * item.num_tokens
            else:
                expanded.append(token_id)
        assert next(remaining, None) is None
        return expanded, tuple(placed)

    def read_answer(self, reply: str) -> str:
        """What stands after the reasoning, if there is any."""
        return reply.partition(THINK_END)[2] if THINK_END in reply else reply


def media_parts(task: Task) -> list[dict[str, Any]]:
    """The pictures and clips of a task's messages in order."""
    contents = [message["content"] for message in task.messages if not isinstance(message["content"], str)]
    return [part for parts in contents for part in parts if part["type"] != "text"]


def _inner(text: str, tags: tuple[str, str]) -> str:
    return text.removeprefix(tags[0]).removesuffix(tags[1])
