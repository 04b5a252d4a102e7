"""What `draft=` names, as far as that can be told without reading a weight, and how errors name it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ernie45.checkpoint.resolve import named_folder
from ernie45.errors import ErnieError, InvalidRequestError, ModelNotFoundError, UnsupportedError
from ernie45.spec import ModelSpec

Draft = str | os.PathLike[str] | None
"""None guesses nothing, "lookup" copies from the prompt, "mtp" is the checkpoint's own head; else a model's name or
folder."""

_MTP_PROJECTION = "mtp_linear_proj.0."  # in the names of one of the head's tensors, in every layout
_OWN = ("lookup", "mtp")
_SMALLER = "use a smaller model of the same family, such as ERNIE-4.5-0.3B-PT for ERNIE-4.5-21B-A3B-PT"


def check_draft(draft: object) -> None:
    """Raises InvalidRequestError for what names nothing that guesses, ModelNotFoundError for a folder that is not
    there."""
    if draft is None:
        return
    if not isinstance(draft, (str, os.PathLike)) or not str(draft).strip():
        raise InvalidRequestError(
            f"draft={draft!r:.100} names nothing that guesses tokens",
            hint='use "lookup", "mtp", the name or folder of a small model with the same tokenizer, or None',
        )
    if is_model(draft):
        with naming_draft(draft):
            named_folder(draft)


def is_model(draft: Draft) -> bool:
    """Whether it names a model of its own."""
    return draft is not None and draft not in _OWN


def has_mtp_head(names: Iterable[str]) -> bool:
    """Whether a checkpoint of tensors with these names has a head for multi-token prediction."""
    return any(_MTP_PROJECTION in name for name in names)


def check_mtp(*, is_text: bool, has_head: bool, model: str) -> None:
    """Raises UnsupportedError where `model` is no text model, or has no head for multi-token prediction."""
    if not is_text or not has_head:
        found = f"has no tensor 'model.{_MTP_PROJECTION}weight'" if is_text else "is not a text model"
        raise UnsupportedError(
            f"draft='mtp' was asked for, but {model} {found}",
            hint="the head comes with most text releases, but not with Thinking ones; a packed folder of an earlier "
            'version lacks it until it is saved again; use draft="lookup", or a small model with the same tokenizer',
        )


def check_draft_spec(spec: ModelSpec, draft_spec: ModelSpec) -> None:
    """Raises InvalidRequestError where a model of `draft_spec` cannot guess for one of `spec`: it is not one of text
    alone, or has another vocabulary."""
    if draft_spec.vision is not None:
        raise InvalidRequestError("this is a vision-language model, and only text models guess", hint=_SMALLER)
    if draft_spec.vocab_size != spec.vocab_size:
        raise another(f"vocabulary of {draft_spec.vocab_size} ids", f"one of {spec.vocab_size}")


def another(drafts: str, models: str) -> InvalidRequestError:
    """What the draft has, and what the model has instead."""
    return InvalidRequestError(f"this model has a {drafts}, the one it would guess for {models}", hint=_SMALLER)


@contextmanager
def naming_draft(draft: Draft) -> Iterator[None]:
    """Have every error inside say that it is about this `draft=`."""
    try:
        yield
    except ErnieError as error:
        hint = error.hint
        if isinstance(error, ModelNotFoundError):
            hint += ' (draft="lookup" and draft="mtp" need no other model)'
        raise type(error)(f"draft={str(draft)!r:.200}: {error.message}", hint=hint) from error
