"""What a checkpoint's folder has beside weights: tokenizer, chat template, defaults of generation."""

from __future__ import annotations

from pathlib import Path

from ernie45.checkpoint.headers import read_json
from ernie45.errors import TokenizerError
from ernie45.spec import GenerationDefaults, ModelSpec, parse_generation_defaults
from ernie45.tokenizer import ChatTemplate, Tokenizer, load_template, load_tokenizer

_END_TOKENS = ("</s>", "<|end_of_sentence|>", "<|im_end|>")


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """What generation_config.json says; the published defaults where there is none."""
    path = folder / "generation_config.json"
    return parse_generation_defaults(read_json(path) if path.is_file() else {})


def load_text_side(folder: Path, spec: ModelSpec) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Tokenizer and template; None for a folder without tokenizer files.

    Raises TokenizerError for a damaged one, or one of more tokens than the model has.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None, None
    if tokenizer.size > spec.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.size} tokens, but the model only {spec.vocab_size}",
            hint="the tokenizer files in the folder belong to another model",
        )
    return tokenizer, load_template(folder)


def find_stop_token_ids(spec: ModelSpec, defaults: GenerationDefaults, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Replies end with `</s>`; `<|end_of_sentence|>`, which closes turns in a history, ends them as well."""
    named = [tokenizer.token_id(token) for token in _END_TOKENS] if tokenizer is not None else []
    return frozenset((*spec.eos_token_ids, *defaults.eos_token_ids, *(i for i in named if i is not None)))
