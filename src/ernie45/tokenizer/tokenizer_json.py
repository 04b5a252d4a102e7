"""Tokenizer from tokenizer.json (the tokenizers library)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ernie45.errors import TokenizerError
from ernie45.tokenizer.token_files import read_json_object, read_token_files
from ernie45.tokenizer.vocabulary import check_encodable, decode_tokens, piece_bytes

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# What every ERNIE 4.5 tokenizer has. With it the bytes of a token do not depend on its neighbours.
_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


class JsonTokenizer:
    """The tokenizer of a folder that has tokenizer.json and no tokenizer.model."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        self._check_decoder(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise TokenizerError(
                f"{path} is not a tokenizer: {error}",
                hint="fetch the file again from where the checkpoint came from",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_tokens(folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added_text: Mapping[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @staticmethod
    def _check_decoder(path: Path) -> None:
        decoder = read_json_object(path).get("decoder")
        parts: list[Any] = decoder.get("decoders", []) if isinstance(decoder, dict) else []
        if parts != _DECODERS:
            raise TokenizerError(
                f"{path} has a decoder ernie45 does not know: {json.dumps(decoder)[:200]}",
                hint="ERNIE 4.5 tokenizers are sentencepiece with byte fallback; put tokenizer.model there",
            )

    def _add_tokens(self, folder: Path) -> None:
        """Register what the other JSON files name and tokenizer.json does not, in the order of their ids."""
        files = read_token_files(folder)
        named = dict.fromkeys([*files.added_ids, *files.special])
        names = sorted(named, key=lambda name: files.added_ids.get(name, math.inf))
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        special = frozenset(files.special)
        self._tokenizer.add_tokens(
            [tokenizers.AddedToken(name, normalized=False) for name in names if name not in known | special]
        )
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in names if name in special]
        )

    @property
    def size(self) -> int:
        return self._size

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        check_encodable(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_tokens(self, ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        added = self._added_text.get(token_id)
        if added is not None:
            return added.encode()
        piece = self.token_text(token_id)
        byte = _BYTE_TOKEN.fullmatch(piece)
        return bytes((int(byte[1], 16),)) if byte else piece_bytes(piece)

    def token_text(self, token_id: int) -> str:
        if not 0 <= token_id < self._size:
            return ""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_id(self, content: str) -> int | None:
        return self._tokenizer.token_to_id(content)
