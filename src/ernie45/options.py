"""From keyword options to a TokenRequest: names and values checked, defaults filled in, the context respected."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ernie45.errors import ContextLengthError, InvalidRequestError, UnsupportedError
from ernie45.spec import GenerationDefaults
from ernie45.tokenizer import THINK_END, Tokenizer
from ernie45.types.prompts import Prompt
from ernie45.types.requests import Sampling, SamplingOptions, ThinkingLimit, TokenRequest

DEFAULT_MAX_NEW_TOKENS = 512

_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))
_DEFAULT_FIELDS = tuple(name for name in _SAMPLING_FIELDS if name not in ("logit_bias", "seed", "logprobs"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestMaker:
    """Makes the requests of one model: its `defaults`, the ids that end its replies, its context in tokens."""

    defaults: GenerationDefaults
    stop_token_ids: frozenset[int]
    context_tokens: int

    def request(
        self, prompt: Prompt, options: Mapping[str, Any], thinking_limit: ThinkingLimit | None = None
    ) -> TokenRequest:
        """Check `options` (those of SamplingOptions) and complete them with the defaults.

        Raises:
            InvalidRequestError: an unknown option, or a value that cannot be used.
            ContextLengthError: prompt and `max_new_tokens` do not fit the context.
        """
        _check_names(options)
        given = {name: options[name] for name in _SAMPLING_FIELDS if options.get(name) is not None}
        defaults = {name: getattr(self.defaults, name) for name in _DEFAULT_FIELDS}
        stop_token_ids = _stop_token_ids(options.get("stop_token_ids"))
        if not _flag("ignore_eos", options.get("ignore_eos")):
            stop_token_ids |= self.stop_token_ids
        return TokenRequest(
            token_ids=prompt.token_ids,
            media=prompt.media,
            sampling=Sampling(**{**defaults, **given}),
            max_new_tokens=self._max_new_tokens(prompt, options.get("max_new_tokens")),
            stop_token_ids=stop_token_ids,
            thinking_limit=thinking_limit,
        )

    def fitting(self, prompt: Prompt) -> Prompt:
        """The prompt itself, if it fits the context. Raises ContextLengthError."""
        if len(prompt) > self.context_tokens:
            raise ContextLengthError(
                f"{_counted(prompt)} do not fit the context of {self.context_tokens} tokens",
                hint=f"{_shorten(prompt)}, or load with a larger context_tokens=",
            )
        return prompt

    def _max_new_tokens(self, prompt: Prompt, wanted: object) -> int:
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1):
            raise InvalidRequestError(
                f"max_new_tokens must be a whole number from 1, not {wanted!r}", hint="leave it out for 512"
            )
        if len(prompt) + (wanted or 1) > self.context_tokens:
            raise ContextLengthError(
                f"{_counted(prompt)} and {wanted or 'at least 1'} new ones do not fit "
                f"the context of {self.context_tokens} tokens",
                hint=f"{_shorten(prompt)}, lower max_new_tokens=, or load with a larger context_tokens=",
            )
        return wanted or min(DEFAULT_MAX_NEW_TOKENS, self.context_tokens - len(prompt))


def _counted(prompt: Prompt) -> str:
    of_media = sum(item.media.num_tokens for item in prompt.media)
    return f"{len(prompt)} prompt tokens" + (f" ({of_media} of pictures and clips)" if of_media else "")


def _shorten(prompt: Prompt) -> str:
    return "lower max_pixels=, give fewer pictures or a shorter clip" if prompt.media else "shorten the prompt"


def checked_items(items: Sequence[Any], what: str) -> Sequence[Any]:
    """The `prompts` or `conversations` (`what`) of a batch. Raises InvalidRequestError: not a list, or empty."""
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise InvalidRequestError(f"{what} must be a list, not {type(items).__name__}", hint=f"write [{what[:-1]}, …]")
    if not items:
        raise InvalidRequestError(f"the list of {what} is empty", hint="give at least one")
    return items


@contextmanager
def naming(item: str) -> Iterator[None]:
    """Put the item's place in a list before the message of what is wrong with it."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(f"{item}: {error.message}", hint=error.hint) from error


def stop_texts(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The `stop` option as a tuple. Raises InvalidRequestError where it is neither text nor texts, or one is empty."""
    stop = options.get("stop")
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequestError(
            f"stop must be text or a list of texts, none empty, not {stop!r}",
            hint='e.g. stop=["\\n\\n", "User:"]; token ids go to stop_token_ids',
        )
    return tuple(texts)


def limit_thinking(budget: int, prompt: Prompt, tokenizer: Tokenizer) -> ThinkingLimit:
    """The `thinking_budget` of a call, in tokens, as the engine keeps it.

    Raises:
        InvalidRequestError: not a whole number from 0.
        UnsupportedError: the prompt asks for no reasoning, or `</think>` is no single token of this tokenizer.
    """
    if not prompt.thinking:
        raise UnsupportedError(
            "thinking_budget= was given, but the reply does not think: the chat template opened no <think>",
            hint="thinking=True asks for it, where the checkpoint can; else leave thinking_budget= out",
        )
    end_ids = tokenizer.encode(THINK_END)
    if len(end_ids) != 1:
        raise UnsupportedError(
            f"thinking_budget= needs {THINK_END} to be one token, and this tokenizer makes {len(end_ids)} of it",
            hint="leave thinking_budget= out; max_new_tokens= limits reasoning and answer together",
        )
    # As the models themselves end their reasoning.
    closing_ids = tuple(tokenizer.encode(f"\n{THINK_END}\n\n"))
    return ThinkingLimit(max_tokens=budget, end_token_id=end_ids[0], closing_ids=closing_ids)


def _check_names(options: Mapping[Any, Any]) -> None:
    known = SamplingOptions.__annotations__
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"options are {', '.join(known)}"
            raise InvalidRequestError(f"there is no option {name!r}", hint=hint)


def _stop_token_ids(ids: object) -> frozenset[int]:
    if ids is None:
        return frozenset()
    # Sets are as good as lists here: the order says nothing.
    if not isinstance(ids, Collection) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise InvalidRequestError(
            f"stop_token_ids must be a list of whole numbers, not {ids!r}", hint="e.g. stop_token_ids=[2]"
        )
    return frozenset(ids)


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"{name} must be True or False, not {value!r}", hint="leave it out for False")
    return bool(value)
