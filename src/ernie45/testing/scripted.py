"""A model that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Sequence

from ernie45 import catalogue
from ernie45.checkpoint.headers import read_json
from ernie45.errors import InvalidRequestError
from ernie45.loading import LoadedModel
from ernie45.model import ErnieModel
from ernie45.runners.scripted import ScriptedRunner
from ernie45.spec import GenerationDefaults, parse_spec
from ernie45.tokenizer import ERNIE45_TEMPLATE, ChatTemplate, load_template, load_tokenizer
from ernie45.types.reports import LoadReport

# The plain form, with the reasoning opened as the vision-language Thinking models do.
_THINKING_TEMPLATE = ERNIE45_TEMPLATE + "{{- '\\n<think>\\n' }}"


def scripted_model(replies: Sequence[str], *, thinking: bool = False) -> ErnieModel:
    """A model whose n-th request is answered with the n-th of `replies`, instantly and without weights.

    Everything else is real: prompts are rendered and encoded with tiny-dense's template and tokenizer, options are
    checked, replies are streamed token by token, stop texts and `max_new_tokens` cut them. Asking for more replies than
    the script has raises InvalidRequestError.

    With `thinking` every prompt of a chat ends in an open `<think>`, so a reply is written as a thinking model does:
    "12 + 30 = 42\\n</think>\\n\\n42".
    """
    if not isinstance(replies, (list, tuple)) or not all(isinstance(reply, str) for reply in replies):
        raise InvalidRequestError(f"replies must be a list of texts, not {replies!r}", hint='e.g. ["Hello!"]')
    entry = catalogue.find("ernie45/tiny-dense")
    assert entry is not None
    folder = catalogue.built_in_folder(entry)
    spec = parse_spec(read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return ErnieModel(
        LoadedModel(
            name="scripted",
            spec=spec,
            runner=ScriptedRunner([tokenizer.encode(reply) for reply in replies]),
            tokenizer=tokenizer,
            template=ChatTemplate(_THINKING_TEMPLATE, {}) if thinking else load_template(folder),
            defaults=GenerationDefaults(),
            stop_token_ids=frozenset(spec.eos_token_ids),
            context_tokens=spec.max_context_tokens,
            report=LoadReport(
                folder="",
                layout="pt",
                read=(),
                weight_bytes=0,
                load_seconds=0.0,
                device="cpu",
                dtype=spec.dtype or "float32",
            ),
        )
    )
