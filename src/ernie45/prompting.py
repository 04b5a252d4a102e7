"""Messages to Prompt: checked, rendered by the chat template, encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ernie45.errors import InvalidRequestError, TemplateError, TokenizerError, UnsupportedError
from ernie45.tokenizer import RESPONSE, THINK, THINK_END, ChatTemplate, Tokenizer, split_reply
from ernie45.types.messages import Conversation, Message
from ernie45.types.prompts import Prompt

_PROMPT_HINT = "for an array or tensor give .tolist(), for messages use chat(), for many prompts batch_generate()"
ROLES = ("system", "user", "assistant")


class Prompter:
    """Makes prompts for one model. `tokenizer` is None for a folder without tokenizer files: then ids only.

    `vocab_size` bounds the ids a caller may give.
    """

    def __init__(self, *, tokenizer: Tokenizer | None, template: ChatTemplate | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size

    def from_messages(self, messages: Conversation, *, thinking: bool | None = None) -> Prompt:
        """Render a conversation, up to where the assistant is to speak.

        `thinking` asks for reasoning before the reply, or for none; None leaves it to the template.

        Raises:
            InvalidRequestError: not a list of messages, an unknown role, or content this model cannot read.
            TemplateError: the chat template refuses the messages, or makes nothing of them.
            TokenizerError: the checkpoint has no tokenizer.
            UnsupportedError: the checkpoint cannot do what `thinking` asks for.
        """
        checked = _checked(messages)
        if thinking is not None and not isinstance(thinking, bool):
            raise InvalidRequestError(
                f"thinking must be True, False or None, not {thinking!r}",
                hint="None follows the checkpoint; how long it may think is thinking_budget=",
            )
        if self._tokenizer is None or self._template is None:
            raise no_tokenizer("chat")
        if self._template.knows_reasoning:
            checked = [_taken_apart(message) for message in checked]
        variables = {} if thinking is None else {"enable_thinking": thinking}
        text = self._template.render(checked, add_generation_prompt=True, variables=variables)
        if not text:
            raise TemplateError(
                "the chat template rendered these messages to an empty text",
                hint="use the template of the published checkpoint",
            )
        opens_thinking = text.rstrip().endswith(THINK)
        if thinking is not None and thinking != opens_thinking:
            raise _cannot_think() if thinking else _always_thinks()
        return Prompt(text=text, token_ids=tuple(self._tokenizer.encode(text)), thinking=opens_thinking)

    def from_prompt(self, prompt: str | Sequence[int] | Prompt) -> Prompt:
        """Take text or token ids as they are; nothing is added, and nothing in the reply is taken for reasoning.

        Raises:
            InvalidRequestError: neither text nor ids, empty, or an id outside the vocabulary.
            TokenizerError: text, and the checkpoint has no tokenizer.
        """
        if isinstance(prompt, Prompt):
            made = Prompt(text=prompt.text, token_ids=self._checked_ids(prompt.token_ids))
        elif isinstance(prompt, str):
            if self._tokenizer is None:
                raise no_tokenizer("a text prompt")
            made = Prompt(text=prompt, token_ids=tuple(self._tokenizer.encode(prompt)))
        else:
            made = Prompt(text="", token_ids=self._checked_ids(prompt))
        if not made.token_ids:
            raise InvalidRequestError("the prompt is empty", hint="give at least one token of text or one id")
        return made

    def _checked_ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequestError(
                f"a prompt is text or a sequence of token ids, not {type(prompt).__name__}",
                hint=_PROMPT_HINT,
            )
        for token_id in prompt:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequestError(
                    f"a token id must be a whole number, not {token_id!r}",
                    hint=_PROMPT_HINT,
                )
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self._vocab_size}",
                    hint="encode the text with this model's own tokenizer",
                )
        return tuple(prompt)


def no_tokenizer(what: str) -> TokenizerError:
    return TokenizerError(
        f"{what} needs a tokenizer, and this checkpoint has neither tokenizer.model nor tokenizer.json",
        hint="put the checkpoint's tokenizer files beside its config.json, or give token ids",
    )


def _cannot_think() -> UnsupportedError:
    return UnsupportedError(
        "thinking=True, but this checkpoint does not think: its chat template opens no <think>",
        hint="leave thinking= out, or load a Thinking checkpoint, such as ERNIE-4.5-21B-A3B-Thinking",
    )


def _always_thinks() -> UnsupportedError:
    return UnsupportedError(
        "thinking=False, but this checkpoint always thinks: its chat template opens <think> whatever it is told",
        hint="thinking_budget=0 ends the reasoning at once; a checkpoint without Thinking in its name answers directly",
    )


def _checked(messages: Conversation) -> list[Message]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of messages, not {type(messages).__name__}",
            hint='e.g. [{"role": "user", "content": "Hi"}]; for plain text use generate()',
        )
    if not messages:
        raise InvalidRequestError("the conversation is empty", hint='e.g. [{"role": "user", "content": "Hi"}]')
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: object) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InvalidRequestError(
            f"message {index} is not a message: {message!r}", hint='write {"role": "user", "content": "…"}'
        )
    if message["role"] not in ROLES:
        raise InvalidRequestError(
            f"message {index} has the unknown role {message['role']!r}", hint=f"roles are {', '.join(ROLES)}"
        )
    unknown = sorted(str(key) for key in message if key not in ("role", "content", "thoughts"))
    if unknown:
        raise InvalidRequestError(
            f"message {index} has {', '.join(map(repr, unknown))}, which this version cannot send to a model",
            hint='a message has "role" and "content", an assistant\'s may have "thoughts"',
        )
    checked: Message = {"role": message["role"], "content": _text_of(index, message["content"])}
    thoughts = message.get("thoughts")
    if thoughts is not None:
        if message["role"] != "assistant" or not isinstance(thoughts, str):
            raise InvalidRequestError(
                f"message {index}, of role {message['role']!r}, has the thoughts {thoughts!r}",
                hint="thoughts are text, the reasoning of an assistant's message; leave them out elsewhere",
            )
        checked["thoughts"] = thoughts
    return checked


def _taken_apart(message: Message) -> Message:
    """An assistant's raw reply, tags and all, as thoughts and content: the template writes the tags by itself."""
    content = message["content"]
    if message["role"] != "assistant" or "thoughts" in message or not isinstance(content, str):
        return message
    start = content.lstrip("\n")
    if THINK_END in content or start.startswith(THINK):
        said = split_reply(content)
    elif start.startswith(RESPONSE):
        said = split_reply(THINK_END + content)
    else:
        return message
    return {"role": "assistant", "content": said.text, "thoughts": said.reasoning}


def _text_of(index: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidRequestError(
            f"message {index}: content must be text or a list of parts, not {type(content).__name__}",
            hint='write "content": "…"',
        )
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequestError(
                f"message {index} has a part of type {kind!r}, and this model reads text only",
                hint='a text part is {"type": "text", "text": "…"}',
            )
        texts.append(part["text"])
    return "".join(texts)
