"""What guesses tokens for a model (`draft=`): checked before weights are read, and put together once they are."""

from __future__ import annotations

import os
from pathlib import Path

from ernie45.backends.base import Backend
from ernie45.backends.kv_cache import KVCache
from ernie45.backends.mtp import PROJECTION
from ernie45.backends.registry import BuildBackend
from ernie45.backends.text import TextBackend, build_text
from ernie45.checkpoint.read import TensorSource
from ernie45.engine.speculation.draft_model import DraftModel
from ernie45.engine.speculation.lookup import PromptLookup
from ernie45.engine.speculation.mtp import MtpProposer
from ernie45.engine.speculation.proposer import Proposer
from ernie45.engine.speculation.speculation import Speculation
from ernie45.errors import InvalidRequestError, UnsupportedError
from ernie45.memory.budget import DTYPE_BYTES, KVDtype, kv_bytes_per_token
from ernie45.memory.plan import MemoryPlan
from ernie45.memory.sizing import DraftNeeds, PlanRequest
from ernie45.spec import ModelSpec
from ernie45.tokenizer import Tokenizer
from ernie45.types.placement import Placement

Draft = str | os.PathLike[str] | None
"""None guesses nothing, "lookup" copies from the prompt, "mtp" is the checkpoint's own head; else a model's name or
folder."""

_OWN = ("lookup", "mtp")


def check_draft(draft: object) -> None:
    """Raises InvalidRequestError for what names nothing that guesses."""
    if draft is not None and (not isinstance(draft, (str, os.PathLike)) or not str(draft).strip()):
        raise InvalidRequestError(
            f"draft={draft!r:.100} names nothing that guesses tokens",
            hint='use "lookup", "mtp", the name or folder of a small model with the same tokenizer, or None',
        )


def is_model(draft: Draft) -> bool:
    """Whether it names a model of its own."""
    return draft is not None and draft not in _OWN


def check_mtp(build: BuildBackend, source: TensorSource, folder: Path) -> None:
    """Raises UnsupportedError where the checkpoint in `folder` has no head for multi-token prediction, or is none of
    the text models, whose head is read."""
    if build is not build_text or f"{PROJECTION}.weight" not in source:
        found = f"has no tensor '{PROJECTION}.weight'" if build is build_text else "is not that of a text model"
        raise UnsupportedError(
            f"draft='mtp' was asked for, but the checkpoint in {folder} {found}",
            hint="the head comes with most text releases, but not with Thinking ones, nor with packed folders; "
            'use draft="lookup", or a small model with the same tokenizer',
        )


def check_draft_model(
    spec: ModelSpec, tokenizer: Tokenizer | None, draft_spec: ModelSpec, draft_tokenizer: Tokenizer | None, folder: Path
) -> None:
    """Raises InvalidRequestError where the ids of the model in `folder` do not mean the same tokens, or it is not one
    of text alone."""
    hint = "use a smaller model of the same family, such as ERNIE-4.5-0.3B-PT for ERNIE-4.5-21B-A3B-PT"
    if draft_spec.vision is not None:
        raise InvalidRequestError(f"the draft in {folder} is a vision-language model, and reads text only", hint=hint)
    if tokenizer is not None and draft_tokenizer is not None:
        _check_tokenizers(tokenizer, draft_tokenizer, folder, hint)
    sizes = spec.vocab_size, draft_spec.vocab_size
    if sizes[0] != sizes[1]:
        raise InvalidRequestError(
            f"the draft in {folder} has a vocabulary of {sizes[1]} ids, the model one of {sizes[0]}", hint=hint
        )


def _check_tokenizers(tokenizer: Tokenizer, draft_tokenizer: Tokenizer, folder: Path, hint: str) -> None:
    if tokenizer.size != draft_tokenizer.size:
        raise InvalidRequestError(
            f"the draft in {folder} has a tokenizer of {draft_tokenizer.size} tokens, the model one of "
            f"{tokenizer.size}",
            hint=hint,
        )
    for token_id in range(tokenizer.size):
        tokens = tokenizer.token_text(token_id), draft_tokenizer.token_text(token_id)
        if tokens[0] != tokens[1]:
            raise InvalidRequestError(
                f"the draft in {folder} has another tokenizer: id {token_id} is {tokens[1]!r} there, and {tokens[0]!r} "
                "in the model",
                hint=hint,
            )


def draft_needs(draft: Draft, request: PlanRequest) -> DraftNeeds | None:
    """What guessing takes beside the model of `request`, for a draft that is no model of its own."""
    if draft != "mtp":
        return None if draft is None else DraftNeeds()
    return DraftNeeds(
        kv_token_bytes=_kv_token_bytes(request.spec, request.dtype, request.kv_dtype) // request.spec.num_layers
    )


def model_needs(spec: ModelSpec, plan: MemoryPlan, kv_dtype: KVDtype) -> DraftNeeds:
    """What guessing takes with the model of `spec`, planned as `plan`."""
    return DraftNeeds(weight_bytes=plan.weight_bytes, kv_token_bytes=_kv_token_bytes(spec, plan.dtype, kv_dtype))


def _kv_token_bytes(spec: ModelSpec, dtype: str, kv_dtype: KVDtype) -> int:
    return kv_bytes_per_token(spec, bytes_per_value=DTYPE_BYTES[dtype], kv_dtype=kv_dtype)


def build_speculation(
    draft: Draft, backend: Backend, draft_backend: Backend | None, plan: MemoryPlan, kv_dtype: KVDtype
) -> Speculation | None:
    """What guesses for `backend`, with as many KV slots as `plan` says; None without a draft."""
    if draft is None:
        return None

    def allocate(backend: Backend, num_layers: int, context_tokens: int) -> KVCache:
        return KVCache.allocate(
            backend.spec,
            num_slots=plan.max_batch,
            context_tokens=context_tokens,
            dtype=backend.dtype,
            kv_dtype=kv_dtype,
            placement=Placement.on(plan.placement.embedding, num_layers),
        )

    proposer: Proposer
    if draft_backend is not None:
        context_tokens = min(plan.context_tokens, draft_backend.spec.max_context_tokens)
        cache = allocate(draft_backend, draft_backend.spec.num_layers, context_tokens)
        proposer = DraftModel(draft_backend, cache, context_tokens=context_tokens)
    elif draft == "mtp":
        assert isinstance(backend, TextBackend)
        assert backend.mtp_head is not None
        proposer = MtpProposer(backend.mtp_head, allocate(backend, 1, plan.context_tokens))
    else:
        proposer = PromptLookup()
    return Speculation(proposer)
