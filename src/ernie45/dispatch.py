"""Prompts with their options become replies under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie45.errors import InvalidRequestError
from ernie45.loading import LoadedModel
from ernie45.options import RequestMaker, checked_items, limit_thinking, naming, stop_texts
from ernie45.prompting import Prompter, no_tokenizer
from ernie45.replies import Reply
from ernie45.tokenizer import TextAssembler
from ernie45.types.messages import Conversation
from ernie45.types.prompts import Prompt
from ernie45.types.requests import TokenRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatcher:
    """Starts the requests of one model on its runner."""

    loaded: LoadedModel
    requests: RequestMaker
    prompter: Prompter

    def start(self, prompt: Prompt, options: Mapping[str, Any], thinking_budget: int | None = None) -> Reply:
        """Raises as `ErnieModel.chat` does."""
        return self._started(*self._prepared(prompt, options, thinking_budget))

    def start_all(
        self, pairs: Sequence[tuple[Prompt, Mapping[str, Any]]], what: str, thinking_budget: int | None = None
    ) -> list[Reply]:
        """Start all of the "prompts" or "conversations" (`what`), after each with its options was checked."""
        prepared = []
        for index, (prompt, options) in enumerate(pairs):
            with naming(f"{what}[{index}]"):
                prepared.append(self._prepared(prompt, options, thinking_budget))
        started: list[Reply] = []
        try:
            for request, assembler in prepared:
                started.append(self._started(request, assembler))
        except BaseException:
            for reply in started:  # nobody will read these
                reply.cancel()
            raise
        return started

    def start_prompts(self, prompts: Sequence[Any], shared: Mapping[str, Any]) -> list[Reply]:
        """Start all, each with the `shared` options and its own. Raises as `ErnieModel.batch_generate` does."""
        pairs: list[tuple[Prompt, Mapping[str, Any]]] = []
        for index, item in enumerate(checked_items(prompts, "prompts")):
            own: dict[str, Any] = {}
            if isinstance(item, Mapping):
                own = dict(item)
                if "prompt" not in own:
                    raise InvalidRequestError(f"prompts[{index}] has no 'prompt'", hint='write {"prompt": …, …}')
                item = own.pop("prompt")
            with naming(f"prompts[{index}]"):
                pairs.append((self.prompter.from_prompt(item), {**shared, **own}))
        return self.start_all(pairs, "prompts")

    def rendered(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any], thinking: bool | None
    ) -> list[tuple[Prompt, Mapping[str, Any]]]:
        """What `start_all` takes."""
        pairs: list[tuple[Prompt, Mapping[str, Any]]] = []
        for index, conversation in enumerate(checked_items(conversations, "conversations")):
            with naming(f"conversations[{index}]"):
                pairs.append((self.prompter.from_messages(conversation, thinking=thinking), options))
        return pairs

    def _prepared(
        self, prompt: Prompt, options: Mapping[str, Any], thinking_budget: int | None
    ) -> tuple[TokenRequest, TextAssembler | None]:
        tokenizer, stop = self.loaded.tokenizer, stop_texts(options)
        limit = None
        if thinking_budget is not None:
            if tokenizer is None:
                raise no_tokenizer("thinking_budget=")
            limit = limit_thinking(thinking_budget, prompt, tokenizer)
        request = self.requests.request(prompt, options, limit)
        if stop and tokenizer is None:
            raise no_tokenizer("a stop text")
        return request, TextAssembler(tokenizer, stop, thinking=prompt.thinking) if tokenizer is not None else None

    def _started(self, request: TokenRequest, assembler: TextAssembler | None) -> Reply:
        return Reply(
            self.loaded.runner.submit(request),
            prompt_tokens=len(request.token_ids),
            assembler=assembler,
            with_logprobs=request.sampling.logprobs is not None,
        )
