from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from ernie45.errors import TokenizerError
from ernie45.tokenizer import load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer.json of ERNIE's kind: "▁" for a space, byte fallback, and truncation left switched on."""
    pieces = ["<unk>", "</s>", *BYTES, "▁", "a", "b", "▁a"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_encodes_whole_texts_without_padding(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert [tokenizer.token_text(i) for i in tokenizer.encode("b a\n</s>")] == ["b", "▁a", "<0x0A>", "</s>"]
    assert tokenizer.decode(tokenizer.encode("b a\n</s>")) == "b a\n"


def test_registers_what_only_the_other_files_name(folder: Path) -> None:
    size = 2 + 256 + 4
    added = {
        str(size + 1): {"content": "<y>", "special": True},
        str(size): {"content": "<x>", "special": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.size == size + 2
    assert tokenizer.encode("<x><y>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<x>"


def test_a_decoder_with_other_rules_is_refused(folder: Path) -> None:
    edit(folder, decoder={"type": "ByteLevel"})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*ByteLevel"):
        load_tokenizer(folder)


def test_broken_files_are_named(folder: Path) -> None:
    edit(folder, model={"type": "nonsense"})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"cut')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is broken"):
        load_tokenizer(folder)
