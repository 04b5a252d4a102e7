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
from ernie45.options import RequestMaker, stop_texts
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
        return collect([self._reply(self._prompter.from_prompt(prompt), options)])[0]

    def stream_generate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> ReplyStream[CompletionChunk]:
        """Like `generate`, chunk by chunk; a chunk comes for every token. Leaving the loop cancels."""
        return ReplyStream(self._reply(self._prompter.from_prompt(prompt), options), _as_is, owner=self)

    def batch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """Continue many prompts at once; results in order, each the same as alone.

        An item may be `{"prompt": …, option: …}`; its options go before the shared ones.
        """
        return collect(self._prompt_replies(prompts, options))

    async def agenerate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> Completion:
        """The async twin of `generate`; cancelling the task cancels the reply."""
        return (await collect_async([self._reply(self._prompter.from_prompt(prompt), options)]))[0]

    def astream_generate(
        self, prompt: PromptLike, **options: Unpack[SamplingOptions]
    ) -> AsyncReplyStream[CompletionChunk]:
        """The async twin of `stream_generate`: `async for chunk in model.astream_generate(…)`."""
        return AsyncReplyStream(self._reply(self._prompter.from_prompt(prompt), options), _as_is, owner=self)

    async def abatch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """The async twin of `batch_generate`."""
        return await collect_async(self._prompt_replies(prompts, options))

    # Chat

    def chat(self, messages: Conversation, **options: Unpack[SamplingOptions]) -> ChatCompletion:
        """Answer a conversation, rendered with the checkpoint's chat template (`render` shows it).

        Raises:
            InvalidRequestError: messages or an option that cannot be used.
            ContextLengthError: conversation and `max_new_tokens` do not fit the context.
        """
        return _chat_completion(collect([self._reply(self.render(messages), options)])[0])

    def stream_chat(self, messages: Conversation, **options: Unpack[SamplingOptions]) -> ReplyStream[ChatChunk]:
        """Like `chat`, chunk by chunk; a chunk comes for every token. Leaving the loop cancels."""
        return ReplyStream(self._reply(self.render(messages), options), _chat_chunk, owner=self)

    def batch_chat(
        self, conversations: Sequence[Conversation], **options: Unpack[SamplingOptions]
    ) -> list[ChatCompletion]:
        """Answer many conversations at once; results in order, each the same as alone."""
        return [_chat_completion(done) for done in collect(self._chat_replies(conversations, options))]

    async def achat(self, messages: Conversation, **options: Unpack[SamplingOptions]) -> ChatCompletion:
        """The async twin of `chat`; cancelling the task cancels the reply."""
        return _chat_completion((await collect_async([self._reply(self.render(messages), options)]))[0])

    def astream_chat(self, messages: Conversation, **options: Unpack[SamplingOptions]) -> AsyncReplyStream[ChatChunk]:
        """The async twin of `stream_chat`: `async for chunk in model.astream_chat(…)`."""
        return AsyncReplyStream(self._reply(self.render(messages), options), _chat_chunk, owner=self)

    async def abatch_chat(
        self, conversations: Sequence[Conversation], **options: Unpack[SamplingOptions]
    ) -> list[ChatCompletion]:
        """The async twin of `batch_chat`."""
        return [_chat_completion(done) for done in await collect_async(self._chat_replies(conversations, options))]

    # Looking inside

    def render(self, messages: Conversation) -> Prompt:
        """The prompt that `chat` would send: its text and token ids."""
        return self._prompter.from_messages(messages)

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

    def _chat_replies(self, conversations: Sequence[Conversation], options: SamplingOptions) -> list[Reply]:
        pairs: list[tuple[Prompt, Mapping[str, Any]]] = []
        for index, conversation in enumerate(_items(conversations, "conversations")):
            with _naming(f"conversations[{index}]"):
                pairs.append((self.render(conversation), options))
        return self._replies(pairs, "conversations")

    def _replies(self, pairs: Sequence[tuple[Prompt, Mapping[str, Any]]], what: str) -> list[Reply]:
        """Start all, after every prompt and option was checked."""
        prepared = []
        for index, (prompt, options) in enumerate(pairs):
            with _naming(f"{what}[{index}]"):
                prepared.append(self._prepared(prompt, options))
        started: list[Reply] = []
        try:
            for request, assembler in prepared:
                started.append(self._started(request, assembler))
        except BaseException:
            for reply in started:  # nobody will read these
                reply.cancel()
            raise
        return started

    def _reply(self, prompt: Prompt, options: SamplingOptions) -> Reply:
        return self._started(*self._prepared(prompt, options))

    def _prepared(self, prompt: Prompt, options: Mapping[str, Any]) -> tuple[TokenRequest, TextAssembler | None]:
        request = self._requests.request(prompt, options)
        stop, tokenizer = stop_texts(options), self._loaded.tokenizer
        if stop and tokenizer is None:
            raise no_tokenizer("a stop text")
        return request, TextAssembler(tokenizer, stop) if tokenizer is not None else None

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


def _as_is(chunk: CompletionChunk) -> CompletionChunk:
    return chunk


def _chat_chunk(chunk: CompletionChunk) -> ChatChunk:
    return ChatChunk(
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        finish_reason=chunk.finish_reason,
        usage=chunk.usage,
    )


def _chat_completion(completion: Completion) -> ChatCompletion:
    return ChatCompletion(
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        logprobs=completion.logprobs,
    )
