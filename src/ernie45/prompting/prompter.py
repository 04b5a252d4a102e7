"""Messages, text or ids to a Prompt: checked, rendered by the chat template, encoded."""

from __future__ import annotations

from collections.abc import Sequence

from ernie45.errors import InvalidRequestError, TemplateError, TokenizerError, UnsupportedError
from ernie45.prompting.media import (
    MediaTokens,
    VisionInput,
    check_placeholders,
    check_text,
    check_texts,
    fits,
    flattened,
    place_media,
)
from ernie45.prompting.messages import CheckedMessage, check_messages, taken_apart
from ernie45.tokenizer import THINK, ChatTemplate, Tokenizer
from ernie45.types.messages import Conversation, Message
from ernie45.types.prompts import Prompt

_PROMPT_HINT = "for an array or tensor give .tolist(), for messages use chat(), for many prompts batch_generate()"


class Prompter:
    """Makes prompts for one model. `tokenizer` is None for a folder without tokenizer files: then ids only.

    `vocab_size` bounds the ids a caller may give. `vision` is None for a model that reads text only.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        vocab_size: int,
        vision: VisionInput | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size
        self._vision = vision

    def from_messages(self, messages: Conversation, *, thinking: bool | None = None) -> Prompt:
        """Render a conversation, up to where the assistant is to speak.

        `thinking` asks for reasoning before the reply, or for none; None leaves it to the template.

        Raises:
            InvalidRequestError: not a list of messages, an unknown role, or content this model cannot read.
            TemplateError: the chat template refuses the messages, or makes nothing of them.
            TokenizerError: the checkpoint has no tokenizer.
            UnsupportedError: the checkpoint cannot do what `thinking` asks for.
        """
        checked = check_messages(messages)
        if thinking is not None and not isinstance(thinking, bool):
            raise InvalidRequestError(
                f"thinking must be True, False or None, not {thinking!r}",
                hint="None follows the checkpoint; how long it may think is thinking_budget=",
            )
        if self._tokenizer is None or self._template is None:
            raise no_tokenizer("chat")
        if self._template.knows_reasoning:
            checked = [taken_apart(message) for message in checked]
        text = self._rendered(self._template, checked, {} if thinking is None else {"enable_thinking": thinking})
        opens_thinking = text.rstrip().endswith(THINK)
        if thinking is not None and thinking != opens_thinking:
            raise _cannot_think() if thinking else _always_thinks()
        parts = [part for message in checked for part in message.media]
        if not parts:
            return Prompt(text=text, token_ids=tuple(self._tokenizer.encode(text)), thinking=opens_thinking)
        vision = self.vision_for(checked)
        media = [vision.prepare(part) for part in parts]
        token_ids, placed = place_media(text, media, self._tokenizer, MediaTokens.of(self._tokenizer))
        return Prompt(text=text, token_ids=token_ids, thinking=opens_thinking, media=placed)

    def vision_for(self, messages: Sequence[CheckedMessage]) -> VisionInput:
        """How this model takes the media of these messages. Raises InvalidRequestError where it takes none."""
        if self._vision is None:
            index, message = next((i, m) for i, m in enumerate(messages) if m.media)
            raise InvalidRequestError(
                f"message {index} has a part of type {message.media[0].kind!r}, and this model reads text only",
                hint="load a vision-language model: ernie45/tiny-vl, or ERNIE-4.5-VL-28B-A3B-PT",
            )
        return self._vision

    def _rendered(
        self, template: ChatTemplate, messages: Sequence[CheckedMessage], variables: dict[str, object]
    ) -> str:
        """The conversation as text, with a placeholder for each picture or clip."""
        kinds = [part.kind for message in messages for part in message.media]
        if self._vision is not None:
            check_texts(messages)
        if not kinds:
            return _nonempty(template.render([_plain(m, m.text) for m in messages], variables=variables))
        self.vision_for(messages)  # refuses media for a model that reads text only
        # Templates know parts of one name or another, or texts with the markers in them.
        failure: TemplateError | None = None
        contents = flattened(messages)
        for form in ("image", "image_url", None):
            rendered = [
                _plain(m, content if form is None else _parts(m, form == "image_url"))
                for m, content in zip(messages, contents, strict=True)
            ]
            try:
                text = template.render(rendered, variables=variables)
            except TemplateError as error:
                failure = error
                continue
            if fits(text, kinds):
                return text
        raise failure or TemplateError(
            f"the chat template has no place for {len(kinds)} pictures or clips",
            hint="use the template of the published checkpoint",
        )

    def from_prompt(self, prompt: str | Sequence[int] | Prompt) -> Prompt:
        """Take text or token ids as they are; nothing is added, and nothing in the reply is taken for reasoning.

        Raises:
            InvalidRequestError: neither text nor ids, empty, or an id outside the vocabulary.
            TokenizerError: text, and the checkpoint has no tokenizer.
        """
        if isinstance(prompt, Prompt):
            made = Prompt(text=prompt.text, token_ids=self._checked_ids(prompt.token_ids), media=prompt.media)
        elif isinstance(prompt, str):
            if self._tokenizer is None:
                raise no_tokenizer("a text prompt")
            if self._vision is not None:
                check_text(prompt, "the prompt")
            made = Prompt(text=prompt, token_ids=tuple(self._tokenizer.encode(prompt)))
        else:
            made = Prompt(text="", token_ids=self._checked_ids(prompt))
        if self._vision is not None and self._tokenizer is not None:
            check_placeholders(made, MediaTokens.of(self._tokenizer))
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


def _plain(message: CheckedMessage, content: str | list[dict[str, object]]) -> Message:
    """A message as templates read it."""
    plain: Message = {"role": message.role, "content": content}
    if message.thoughts is not None:
        plain["thoughts"] = message.thoughts
    return plain


def _parts(message: CheckedMessage, as_urls: bool) -> str | list[dict[str, object]]:
    """The parts as templates read them; media only say that they are there."""
    if not message.media:
        return message.text
    parts: list[dict[str, object]] = []
    for part in message.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        elif as_urls:
            parts.append({"type": f"{part.kind}_url", f"{part.kind}_url": {"url": ""}})
        else:
            parts.append({"type": part.kind, part.kind: ""})
    return parts


def _nonempty(text: str) -> str:
    if not text:
        raise TemplateError(
            "the chat template rendered these messages to an empty text",
            hint="use the template of the published checkpoint",
        )
    return text


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
