"""ErnieModel: messages or text in, replies out. The pipeline prompt -> request -> runner -> reply, and nothing else."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, final

from typing_extensions import Self, Unpack

from ernie45.errors import InvalidRequestError
from ernie45.loading import LoadedModel, MemoryLimit, load
from ernie45.options import RequestMaker, limit_thinking, stop_texts
from ernie45.prompting import Prompter, no_tokenizer
from ernie45.replies import AsyncReplyStream, Reply, ReplyStream, collect, collect_async
from ernie45.scoring import prompt_logits, prompt_score
from ernie45.spec import ModelSpec
from ernie45.tokenizer import TextAssembler, Tokenizer
from ernie45.types.messages import Conversation
from ernie45.types.prompts import Prompt
from ernie45.types.reports import LoadReport
from ernie45.types.requests import SamplingOptions, TokenRequest
from ernie45.types.results import ChatChunk, ChatCompletion, Completion, CompletionChunk, Score

if TYPE_CHECKING:
    from torch import Tensor

PromptLike: TypeAlias = str | Sequence[int] | Prompt


@final
class ErnieModel:
    """A loaded model. Any number of threads and tasks may use one at the same time.

    ```python
    with ErnieModel.from_pretrained("ernie45/tiny-dense") as model:
        print(model.chat([{"role": "user", "content": "What is 12 + 30?"}]).text)
    ```
    """

    def __init__(self, loaded: LoadedModel) -> None:
        """Not for direct use: see `from_pretrained` and `ernie45.testing.scripted_model`."""
        self._loaded = loaded
        self._prompter = Prompter(
            tokenizer=loaded.tokenizer, template=loaded.template, vocab_size=loaded.spec.vocab_size
        )
        self._requests = RequestMaker(
            defaults=loaded.defaults, stop_token_ids=loaded.stop_token_ids, context_tokens=loaded.context_tokens
        )
        # Also runs when the model is dropped without close(), and at interpreter exit.
        self._close = weakref.finalize(self, loaded.runner.close)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        quantization: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        memory: MemoryLimit | None = None,
        context_tokens: int | None = None,
        max_batch: int | None = None,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        progress: bool = True,
    ) -> Self:
        """Load a checkpoint: a folder (then no network is used), `"ernie45/tiny-dense"`, a short name or a Hub id.

        Args:
            quantization: "auto" and "none" keep the checkpoint's precision; other presets come later.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            dtype: "auto" is the checkpoint's (float32 where the CPU has no bf16); "float32", "bfloat16" or "float16".
            memory: limit for weights and KV cache, "12GiB" for the host or {"cuda:0": "20GiB"}; None is what is free.
            context_tokens: longest prompt + reply in tokens; None is 8192, the model's maximum or what fits.
            max_batch: how many requests run at a time, others wait; None is 32 or what fits.
            adapter: folder of a LoRA adapter that PEFT saved; it is merged into the weights while they are read.
            revision: branch, tag or commit of a Hub id.
            cache_dir: where downloads go; None is huggingface_hub's cache.
            local_files_only: use what is cached and no network.
            token: for private and gated repositories of the Hub.
            progress: show progress bars on stderr when it is a terminal or notebook.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not ERNIE 4.5; one subclass for each case.
            OutOfMemoryError: it does not fit, with the numbers.
            UnsupportedError: this machine or version cannot serve a device, dtype or preset.
            InvalidRequestError: an argument of the wrong kind or range.
        """
        loaded = load(
            name_or_path,
            quantization=quantization,
            device=device,
            dtype=dtype,
            memory=memory,
            context_tokens=context_tokens,
            max_batch=max_batch,
            adapter=adapter,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            progress=progress,
        )
        return cls(loaded)

    # Completion

    def generate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> Completion:
        """Continue a prompt (text, token ids, or what `render` gives). Nothing is added to it.

        Raises:
            InvalidRequestError: a prompt or option that cannot be used.
            ContextLengthError: prompt and `max_new_tokens` do not fit the context.
        """
        return _completion(collect([self._reply(self._prompter.from_prompt(prompt), options)])[0])

    def stream_generate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> ReplyStream[CompletionChunk]:
        """Like `generate`, chunk by chunk; a chunk comes for every token. Leaving the loop cancels."""
        return ReplyStream(self._reply(self._prompter.from_prompt(prompt), options), _completion_chunk, owner=self)

    def batch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """Continue many prompts at once; results in order, each the same as alone.

        An item may be `{"prompt": …, option: …}`; its options go before the shared ones.
        """
        return [_completion(done) for done in collect(self._prompt_replies(prompts, options))]

    async def agenerate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> Completion:
        """The async twin of `generate`; cancelling the task cancels the reply."""
        return _completion((await collect_async([self._reply(self._prompter.from_prompt(prompt), options)]))[0])

    def astream_generate(
        self, prompt: PromptLike, **options: Unpack[SamplingOptions]
    ) -> AsyncReplyStream[CompletionChunk]:
        """The async twin of `stream_generate`: `async for chunk in model.astream_generate(…)`."""
        return AsyncReplyStream(self._reply(self._prompter.from_prompt(prompt), options), _completion_chunk, owner=self)

    async def abatch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """The async twin of `batch_generate`."""
        return [_completion(done) for done in await collect_async(self._prompt_replies(prompts, options))]

    # Chat

    def chat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ChatCompletion:
        """Answer a conversation, rendered with the checkpoint's chat template (`render` shows it).

        Args:
            thinking: whether to reason before the answer; None does as the checkpoint does.
            thinking_budget: most tokens of reasoning, part of `max_new_tokens`; None sets no limit of its own.

        Raises:
            InvalidRequestError: messages or an option that cannot be used.
            ContextLengthError: conversation and `max_new_tokens` do not fit the context.
            UnsupportedError: the checkpoint cannot think, or cannot do without.
        """
        return collect([self._chat_reply(messages, options, thinking, thinking_budget)])[0]

    def stream_chat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ReplyStream[ChatChunk]:
        """Like `chat`, chunk by chunk; a chunk comes for every token. Leaving the loop cancels."""
        return ReplyStream(self._chat_reply(messages, options, thinking, thinking_budget), _as_is, owner=self)

    def batch_chat(
        self,
        conversations: Sequence[Conversation],
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatCompletion]:
        """Answer many conversations at once; results in order, each the same as alone."""
        return collect(self._chat_replies(conversations, options, thinking, thinking_budget))

    async def achat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ChatCompletion:
        """The async twin of `chat`; cancelling the task cancels the reply."""
        return (await collect_async([self._chat_reply(messages, options, thinking, thinking_budget)]))[0]

    def astream_chat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncReplyStream[ChatChunk]:
        """The async twin of `stream_chat`: `async for chunk in model.astream_chat(…)`."""
        return AsyncReplyStream(self._chat_reply(messages, options, thinking, thinking_budget), _as_is, owner=self)

    async def abatch_chat(
        self,
        conversations: Sequence[Conversation],
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatCompletion]:
        """The async twin of `batch_chat`."""
        return await collect_async(self._chat_replies(conversations, options, thinking, thinking_budget))

    # Looking inside

    def render(self, messages: Conversation, *, thinking: bool | None = None) -> Prompt:
        """The prompt that `chat` would send: its text and token ids."""
        return self._prompter.from_messages(messages, thinking=thinking)

    def logits(self, prompt: PromptLike, positions: Sequence[int] | None = None) -> Tensor:
        """Raw float32 logits [T, V] after each token of a prompt, or [n, V] of the `positions` asked for
        (negative ones count from the end). Nothing is masked.

        Raises:
            ContextLengthError: the prompt is longer than the context.
            OutOfMemoryError: the result would not fit, with both numbers.
        """
        return prompt_logits(
            self._loaded.runner,
            self._requests.fitting(self._prompter.from_prompt(prompt)),
            positions,
            self.spec.vocab_size,
        )

    def score(self, text: PromptLike) -> Score:
        """Log-probability of each token after the ones before it, and the text's perplexity.

        Raises:
            InvalidRequestError: fewer than two tokens.
        """
        return prompt_score(self._loaded.runner, self._requests.fitting(self._prompter.from_prompt(text)))

    @property
    def name(self) -> str:
        """What the model was loaded as."""
        return self._loaded.name

    @property
    def spec(self) -> ModelSpec:
        """The model's shape and constants, from its config.json."""
        return self._loaded.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises TokenizerError where the folder has none."""
        if self._loaded.tokenizer is None:
            raise no_tokenizer("model.tokenizer")
        return self._loaded.tokenizer

    @property
    def context_tokens(self) -> int:
        """Longest prompt + reply, in tokens."""
        return self._loaded.context_tokens

    @property
    def load_report(self) -> LoadReport:
        """What was read from the checkpoint, what was ignored and why."""
        return self._loaded.report

    # Lifetime

    def close(self) -> None:
        """End all requests and give the memory back. Safe to repeat; later calls raise ModelClosedError."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        report = self._loaded.report
        state = "" if self._close.alive else ", closed"
        return (
            f"<ErnieModel {self.name!r}: {report.weight_bytes / 1e6:,.1f} MB, {report.dtype} on {report.device}{state}>"
        )

    # Requests

    def _prompt_replies(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], shared: SamplingOptions
    ) -> list[Reply]:
        pairs: list[tuple[Prompt, Mapping[str, Any]]] = []
        for index, item in enumerate(_items(prompts, "prompts")):
            own: dict[str, Any] = {}
            if isinstance(item, Mapping):
                own = dict(item)
                if "prompt" not in own:
                    raise InvalidRequestError(f"prompts[{index}] has no 'prompt'", hint='write {"prompt": …, …}')
                item = own.pop("prompt")
            with _naming(f"prompts[{index}]"):
                pairs.append((self._prompter.from_prompt(item), {**shared, **own}))
        return self._replies(pairs, "prompts")

    def _chat_replies(
        self,
        conversations: Sequence[Conversation],
        options: SamplingOptions,
        thinking: bool | None,
        thinking_budget: int | None,
    ) -> list[Reply]:
        pairs: list[tuple[Prompt, Mapping[str, Any]]] = []
        for index, conversation in enumerate(_items(conversations, "conversations")):
            with _naming(f"conversations[{index}]"):
                pairs.append((self.render(conversation, thinking=thinking), options))
        return self._replies(pairs, "conversations", thinking_budget)

    def _replies(
        self, pairs: Sequence[tuple[Prompt, Mapping[str, Any]]], what: str, thinking_budget: int | None = None
    ) -> list[Reply]:
        """Start all, after every prompt and option was checked."""
        prepared = []
        for index, (prompt, options) in enumerate(pairs):
            with _naming(f"{what}[{index}]"):
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

    def _chat_reply(
        self, messages: Conversation, options: SamplingOptions, thinking: bool | None, thinking_budget: int | None
    ) -> Reply:
        return self._reply(self.render(messages, thinking=thinking), options, thinking_budget)

    def _reply(self, prompt: Prompt, options: SamplingOptions, thinking_budget: int | None = None) -> Reply:
        return self._started(*self._prepared(prompt, options, thinking_budget))

    def _prepared(
        self, prompt: Prompt, options: Mapping[str, Any], thinking_budget: int | None
    ) -> tuple[TokenRequest, TextAssembler | None]:
        limit = None if thinking_budget is None else limit_thinking(thinking_budget, prompt, self.tokenizer)
        request = self._requests.request(prompt, options, limit)
        stop, tokenizer = stop_texts(options), self._loaded.tokenizer
        if stop and tokenizer is None:
            raise no_tokenizer("a stop text")
        return request, TextAssembler(tokenizer, stop, thinking=prompt.thinking) if tokenizer is not None else None

    def _started(self, request: TokenRequest, assembler: TextAssembler | None) -> Reply:
        return Reply(
            self._loaded.runner.submit(request),
            prompt_tokens=len(request.token_ids),
            assembler=assembler,
            with_logprobs=request.sampling.logprobs is not None,
        )


def _items(items: Sequence[Any], what: str) -> Sequence[Any]:
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence):
        raise InvalidRequestError(f"{what} must be a list, not {type(items).__name__}", hint=f"write [{what[:-1]}, …]")
    if not items:
        raise InvalidRequestError(f"the list of {what} is empty", hint="give at least one")
    return items


@contextmanager
def _naming(item: str) -> Iterator[None]:
    """Put the item's place in a list before the message of what is wrong with it."""
    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(f"{item}: {error.message}", hint=error.hint) from error


def _as_is(chunk: ChatChunk) -> ChatChunk:
    return chunk


def _completion_chunk(chunk: ChatChunk) -> CompletionChunk:
    return CompletionChunk(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        finish_reason=chunk.finish_reason,
        usage=chunk.usage,
    )


def _completion(done: ChatCompletion) -> Completion:
    return Completion(
        text=done.text,
        token_ids=done.token_ids,
        finish_reason=done.finish_reason,
        usage=done.usage,
        logprobs=done.logprobs,
    )
