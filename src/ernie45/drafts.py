"""What guesses tokens for a model (`draft=`): checked before weights are read, and put together once they are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ernie45.backends.base import Backend
from ernie45.backends.kv_cache import KVCache
from ernie45.backends.registry import BuildBackend, find_architecture
from ernie45.backends.text import TextBackend, build_text
from ernie45.checkpoint.open import read_config
from ernie45.engine.speculation.draft_model import DraftModel
from ernie45.engine.speculation.lookup import PromptLookup
from ernie45.engine.speculation.mtp import MtpProposer
from ernie45.engine.speculation.proposer import Proposer
from ernie45.engine.speculation.speculation import Speculation
from ernie45.memory.budget import KVDtype
from ernie45.memory.draft import (
    Draft,
    another,
    check_draft_spec,
    check_mtp,
    has_mtp_head,
    is_model,
    naming_draft,
)
from ernie45.memory.plan import MemoryPlan
from ernie45.spec import ModelSpec
from ernie45.tokenizer import Tokenizer, load_tokenizer
from ernie45.types.placement import Placement


def find_draft(draft: Draft, model_folder: Path, fetch: Callable[..., Path]) -> Path | None:
    """The folder of a model that guesses for the one in `model_folder`; None for what guesses without one. `fetch` is
    `resolve`, with its options. Configs and tokenizers of the two are compared before weights are fetched.

    Raises InvalidRequestError where the ids of the two do not mean the same tokens, or the draft is not one of text
    alone; and what `resolve` raises.
    """
    if draft is None or not is_model(draft):
        return None
    spec, tokenizer = _read(model_folder)  # its own faults are not the draft's
    compared: list[Path] = []

    def compare(folder: Path) -> None:
        draft_spec, draft_tokenizer = _read(folder)
        check_draft_spec(spec, draft_spec)
        if tokenizer is not None and draft_tokenizer is not None:
            _check_tokens(tokenizer, draft_tokenizer)
        compared.append(folder)

    with naming_draft(draft):
        folder = fetch(draft, check=compare)
        if not compared:  # a folder that was not fetched
            compare(folder)
    return folder


def _read(folder: Path) -> tuple[ModelSpec, Tokenizer | None]:
    config = read_config(folder)
    return find_architecture(config).parse_spec(config), load_tokenizer(folder)


def _check_tokens(tokenizer: Tokenizer, draft_tokenizer: Tokenizer) -> None:
    if tokenizer.size != draft_tokenizer.size:
        raise another(f"tokenizer of {draft_tokenizer.size} tokens", f"one of {tokenizer.size}")
    for token_id in range(tokenizer.size):
        tokens = draft_tokenizer.token_text(token_id), tokenizer.token_text(token_id)
        if tokens[0] != tokens[1]:
            raise another(f"tokenizer whose id {token_id} is {tokens[0]!r}", f"one where that is {tokens[1]!r}")


def check_head(draft: Draft, build: BuildBackend, names: Collection[str] | None, folder: Path) -> None:
    """Raises UnsupportedError for draft="mtp" where the checkpoint in `folder`, of tensors with these `names` if they
    are known, has no such head, or is none of the text models."""
    if draft == "mtp":
        has_head = names is None or has_mtp_head(names)
        check_mtp(is_text=build is build_text, has_head=has_head, model=f"the model in {folder}")


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
