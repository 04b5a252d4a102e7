"""Tokenizers to test with: a small one made here, the published one, and transformers' reading of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sentencepiece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPUS = [
    "the cat sat on the mat",
    "a cat and a hat",
    "that is the hat of the cat",
    "你好，世界",
    "世界你好",
] * 20


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of ERNIE's kind (BPE, byte fallback, no dummy prefix) and two added tokens."""
    folder = tmp_path_factory.mktemp("small-tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        control_symbols=["<control>"],
        minloglevel=2,
    )
    num_pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "added_tokens_decoder": {
            str(num_pieces): {"content": "<|special|>", "special": True, **plain},
            str(num_pieces + 1): {"content": "<|plain|>", "special": False, **plain},
        },
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def published_folder(shared_data: Path) -> Path:
    """The tokenizer files of ERNIE-4.5-0.3B-PT."""
    return shared_data / "ERNIE-4.5-0.3B-PT"


@pytest.fixture(scope="session")
def reference(published_folder: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of the published folder; the conversion takes some seconds."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(published_folder)
    return tokenizer
