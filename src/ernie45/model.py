"""ErnieModel: messages or text in, replies out. The pipeline prompt -> request -> runner -> reply, and nothing else."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, final

from typing_extensions import Self, Unpack

from ernie45.dispatch import Dispatcher
from ernie45.errors import UnsupportedError
from ernie45.experts.trace import MAX_TOKENS, Recording
from ernie45.loading import LoadedModel, LoadOptions, load
from ernie45.memory.budget import KVDtype, MemoryLimit
from ernie45.memory.draft import Draft
from ernie45.memory.plan import MemoryPlan
from ernie45.options import RequestMaker
from ernie45.planning import measured
from ernie45.presets import QuantPreset
from ernie45.prompting import Prompter, no_tokenizer, preview_media
from ernie45.replies import (
    AsyncReplyStream,
    Reply,
    ReplyStream,
    as_completion,
    as_completion_chunk,
    as_it_is,
    collect,
    collect_async,
)
from ernie45.saving import save_loaded
from ernie45.scoring import prompt_logits, prompt_score
from ernie45.spec import ModelSpec
from ernie45.tokenizer import Tokenizer
from ernie45.types.limits import MediaLimits
from ernie45.types.messages import Conversation
from ernie45.types.previews import MediaPreview
from ernie45.types.prompts import Prompt
from ernie45.types.reports import LoadReport
from ernie45.types.requests import SamplingOptions
from ernie45.types.results import ChatChunk, ChatCompletion, Completion, CompletionChunk, Score
from ernie45.types.stats import ExpertCounts, ModelStats

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
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
            tokenizer=loaded.tokenizer,
            template=loaded.template,
            vocab_size=loaded.spec.vocab_size,
            vision=loaded.vision,
        )
        self._requests = RequestMaker(
            defaults=loaded.defaults, stop_token_ids=loaded.stop_token_ids, context_tokens=loaded.context_tokens
        )
        self._dispatcher = Dispatcher(loaded=loaded, requests=self._requests, prompter=self._prompter)
        # Also runs when the model is dropped without close(), and at interpreter exit.
        self._close = weakref.finalize(self, loaded.runner.close)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        quantization: str | QuantPreset = "auto",
        device: str = "auto",
        dtype: str = "auto",
        memory: MemoryLimit | None = None,
        context_tokens: int | None = None,
        max_batch: int | None = None,
        kv_dtype: KVDtype = "auto",
        prefix_cache: bool = True,
        compile: bool = True,
        draft: Draft = None,
        adapter: str | os.PathLike[str] | None = None,
        max_pixels: int | None = None,
        media_limits: MediaLimits | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | None = None,
        progress: bool = True,
    ) -> Self:
        """Load a checkpoint: a folder (then no network is used), `"ernie45/tiny-dense"`, a short name or a Hub id.

        Args:
            quantization: a preset: "none" keeps the checkpoint's precision; "int8" and "int4" are ours and cover the
                experts; "nf4" and "bnb-int8" are bitsandbytes', slow on a CPU; "auto" is the best quality that fits.
            device: "auto", "cpu", "cuda", "cuda:1" or "mps".
            dtype: "auto" is the checkpoint's (float32 where the CPU has no bf16); "float32", "bfloat16" or "float16".
            memory: what may be used, "12GiB" of the host or {"cuda:0": "20GiB", "cpu": "12GiB"}; None is what is free.
            context_tokens: longest prompt + reply in tokens; None is 8192, the model's maximum or what fits.
            max_batch: how many requests run at a time, others wait; None is 32 or what fits.
            kv_dtype: of the KV cache; "auto" is the model's dtype, "int8" takes about half of that.
            prefix_cache: whether a prompt takes over what the KV cache still holds of one that began like it.
            compile: on a CUDA GPU, whether layers go through torch.compile; for a few replies False is quicker.
            draft: what guesses tokens, several of which a step checks; replies stay the same. "lookup" copies from the
                prompt, "mtp" is the checkpoint's own head, a name or folder loads a model with the same tokenizer.
            adapter: folder of a LoRA adapter that PEFT saved; it is merged into the weights while they are read.
            max_pixels: most pixels a picture is resized to (a frame of a clip at most to the checkpoint's own limit);
                None is the checkpoint's, on a CPU 802,816 (`preview` says what a picture costs).
            media_limits: what is refused of pictures and clips from outside, such as URLs of private addresses.
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
        options = LoadOptions(
            quantization=quantization,
            device=device,
            dtype=dtype,
            memory=memory,
            context_tokens=context_tokens,
            max_batch=max_batch,
            kv_dtype=kv_dtype,
            prefix_cache=prefix_cache,
            compile=compile,
            draft=draft,
            adapter=adapter,
            max_pixels=max_pixels,
            media_limits=media_limits,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            progress=progress,
        )
        return cls(load(name_or_path, options))

    # Completion

    def generate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> Completion:
        """Continue a prompt (text, token ids, or what `render` gives). Nothing is added to it.

        Raises:
            InvalidRequestError: a prompt or option that cannot be used.
            ContextLengthError: prompt and `max_new_tokens` do not fit the context.
        """
        return as_completion(collect([self._completion(prompt, options)])[0])

    def stream_generate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> ReplyStream[CompletionChunk]:
        """Like `generate`, chunk by chunk; a chunk comes for every token. Leaving the loop cancels."""
        return ReplyStream(self._completion(prompt, options), as_completion_chunk, owner=self)

    def batch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """Continue many prompts at once; results in order, each the same as alone.

        An item may be `{"prompt": …, option: …}`; its options go before the shared ones.
        """
        return [as_completion(done) for done in collect(self._dispatcher.start_prompts(prompts, options))]

    async def agenerate(self, prompt: PromptLike, **options: Unpack[SamplingOptions]) -> Completion:
        """The async twin of `generate`; cancelling the task cancels the reply."""
        return as_completion((await collect_async([self._completion(prompt, options)]))[0])

    def astream_generate(
        self, prompt: PromptLike, **options: Unpack[SamplingOptions]
    ) -> AsyncReplyStream[CompletionChunk]:
        """The async twin of `stream_generate`: `async for chunk in model.astream_generate(…)`."""
        return AsyncReplyStream(self._completion(prompt, options), as_completion_chunk, owner=self)

    async def abatch_generate(
        self, prompts: Sequence[PromptLike | Mapping[str, Any]], **options: Unpack[SamplingOptions]
    ) -> list[Completion]:
        """The async twin of `batch_generate`."""
        return [as_completion(done) for done in await collect_async(self._dispatcher.start_prompts(prompts, options))]

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
        return ReplyStream(self._chat_reply(messages, options, thinking, thinking_budget), as_it_is, owner=self)

    def batch_chat(
        self,
        conversations: Sequence[Conversation],
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatCompletion]:
        """Answer many conversations at once; results in order, each the same as alone."""
        pairs = self._dispatcher.rendered(conversations, options, thinking)
        return collect(self._dispatcher.start_all(pairs, "conversations", thinking_budget))

    async def achat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ChatCompletion:
        """The async twin of `chat`; cancelling the task cancels the reply."""
        prompt = await self._aside(lambda: self.render(messages, thinking=thinking))
        return (await collect_async([self._dispatcher.start(prompt, options, thinking_budget)]))[0]

    def astream_chat(
        self,
        messages: Conversation,
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncReplyStream[ChatChunk]:
        """The async twin of `stream_chat`: `async for chunk in model.astream_chat(…)`.

        Pictures and clips are opened before it returns; open those that take long, such as URLs, beforehand.
        """
        return AsyncReplyStream(self._chat_reply(messages, options, thinking, thinking_budget), as_it_is, owner=self)

    async def abatch_chat(
        self,
        conversations: Sequence[Conversation],
        *,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatCompletion]:
        """The async twin of `batch_chat`."""
        pairs = await self._aside(lambda: self._dispatcher.rendered(conversations, options, thinking))
        return await collect_async(self._dispatcher.start_all(pairs, "conversations", thinking_budget))

    # Looking inside

    def render(self, messages: Conversation, *, thinking: bool | None = None) -> Prompt:
        """The prompt that `chat` would send: its text and token ids."""
        return self._prompter.from_messages(messages, thinking=thinking)

    def preview(self, messages: Conversation) -> list[MediaPreview]:
        """What each picture and clip of a conversation will cost: tokens, memory and estimated seconds, in order.

        They are opened, not encoded. The first call measures for a moment how fast this machine computes.

        Raises:
            InvalidRequestError: messages that cannot be used, or a picture or clip that cannot be read (`MediaError`).
        """
        report = self._loaded.report
        return preview_media(messages, self._prompter, spec=self.spec, device=report.device, dtype=report.dtype)

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

    def trace_routing(self, max_tokens: int = MAX_TOKENS) -> AbstractContextManager[Recording]:
        """Record which experts are chosen: `with model.trace_routing() as recording: …`, then `recording.trace`.

        Recorded are the steps of all requests, of whichever thread, that run within the block, with their tokens in the
        order of the steps: rows of a batch take turns, guesses that were wrong are there, too, and what was taken over
        from an earlier prompt is not. What comes after `max_tokens` is only counted. Replies stay the same.

        Raises:
            UnsupportedError: the model has no routed experts, or runs a script.
            InvalidRequestError: `max_tokens` is not positive, or, as the block begins, another records already.
        """
        if self._loaded.routing is None:
            raise UnsupportedError(f"{self.name} has no routed experts", hint="trace one that has, such as tiny-moe")
        return self._loaded.routing.recording(max_tokens)

    @property
    def name(self) -> str:
        """What the model was loaded as."""
        return self._loaded.name

    @property
    def plan(self) -> MemoryPlan:
        """What was planned to lie where, and how fast it should run: that is measured when first asked for (0.1 s).

        Raises UnsupportedError for a model that runs a script.
        """
        if self._loaded.plan is None:
            raise UnsupportedError("a scripted model has no plan", hint="plan_memory() plans any model by name")
        return measured(self._loaded.plan, Path(self._loaded.report.folder))

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
    def stats(self) -> ModelStats:
        """Where the time of loading went, how many guessed tokens were right so far, and what was read of experts.

        Raises UnsupportedError for a scripted model.
        """
        if self._loaded.stats is None:
            raise UnsupportedError("a scripted model was not loaded", hint="ask a model that was")
        stats, guessed, caches = self._loaded.stats, self._loaded.speculation, self._loaded.expert_caches
        if guessed is not None:
            stats = replace(stats, draft_tokens=guessed.num_proposed, accepted_draft_tokens=guessed.num_accepted)
        if caches:
            stats = replace(stats, experts=sum((cache.counts for cache in caches), ExpertCounts()))
        return stats

    @property
    def load_report(self) -> LoadReport:
        """What was read from the checkpoint, what was ignored and why."""
        return self._loaded.report

    def save_pretrained(self, folder: str | os.PathLike[str], *, progress: bool = True) -> None:
        """Write the model as it is quantised to a new or empty folder, from which it loads without that work.

        The checkpoint it came from is read once more. An unquantised model becomes a plain -PT folder. What is not
        quantised keeps the dtype it is stored in; with an adapter, what that changed takes the model's dtype.

        Raises:
            InvalidRequestError: `folder` names none, is not empty, or lies in the checkpoint's.
            UnsupportedError: the preset is bitsandbytes', or the model is a scripted one.
            CheckpointError: the checkpoint is gone or has changed, or the disk is full.
        """
        save_loaded(self._loaded.origin, folder, progress=progress)

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

    async def _aside(self, make: Callable[[], T]) -> T:
        """What `make` gives, without holding up the event loop where it may open pictures."""
        return make() if self._loaded.vision is None else await asyncio.to_thread(make)

    def _completion(self, prompt: PromptLike, options: SamplingOptions) -> Reply:
        return self._dispatcher.start(self._prompter.from_prompt(prompt), options)

    def _chat_reply(
        self, messages: Conversation, options: SamplingOptions, thinking: bool | None, thinking_budget: int | None
    ) -> Reply:
        return self._dispatcher.start(self.render(messages, thinking=thinking), options, thinking_budget)
