"""Tokenizer from tokenizer.model (sentencepiece) and the JSON files beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from ernie45.errors import TokenizerError
from ernie45.tokenizer.token_files import TokenFiles, check_size, read_token_files
from ernie45.tokenizer.vocabulary import check_encodable, decode_tokens, piece_bytes


class SentencePieceTokenizer:
    """The tokenizer of a folder that has tokenizer.model.

    Only the tokens which the JSON files register are found in raw text: a control piece of the model such as
    `<mask:2>` has an id, yet typed by a user it is split like any other text.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        check_size(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise TokenizerError(
                f"{path} is not a sentencepiece model: {error}",
                hint="fetch the file again; a Git LFS pointer or a cut download looks like this",
            ) from error
        files = read_token_files(folder)
        self._num_pieces: int = self._model.get_piece_size()
        self._registered = self._register(files, folder)
        self._added_text = {
            token_id: content for content, token_id in self._registered.items() if token_id >= self._num_pieces
        }
        self._special = frozenset(self._registered[content] for content in files.special) | self._model_specials()
        self._size = max([self._num_pieces - 1, *self._added_text]) + 1
        self._added_pattern = re.compile(f"({_longest_of(list(self._registered))})")

    def _register(self, files: TokenFiles, folder: Path) -> dict[str, int]:
        """Give every added token its id: the files' one, else the model's piece, else the next free id."""
        registered = dict(files.added_ids)
        for token_id in self._model_specials():
            registered.setdefault(self._model.id_to_piece(token_id), token_id)
        next_id = max([self._num_pieces - 1, *registered.values()]) + 1
        for content in files.special:
            if content in registered:
                continue
            piece_id = self._piece_id(content)
            registered[content] = next_id if piece_id is None else piece_id
            next_id += piece_id is None
        for content, token_id in registered.items():
            if token_id < self._num_pieces and self._model.id_to_piece(token_id) != content:
                raise TokenizerError(
                    f"{folder}: the added token {content!r} claims id {token_id}, which tokenizer.model "
                    f"gives to {self._model.id_to_piece(token_id)!r}",
                    hint="tokenizer.model and the JSON files are of different checkpoints; fetch both again",
                )
        return registered

    def _model_specials(self) -> frozenset[int]:
        named = (self._model.unk_id(), self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        return frozenset(token_id for token_id in named if token_id >= 0)

    def _piece_id(self, content: str) -> int | None:
        token_id: int = self._model.piece_to_id(content)
        # sentencepiece answers with the unknown token's id for anything it does not have
        return token_id if self._model.id_to_piece(token_id) == content else None

    @property
    def size(self) -> int:
        return self._size

    @property
    def special_token_ids(self) -> frozenset[int]:
        return self._special

    def encode(self, text: str) -> list[int]:
        check_encodable(text)
        ids: list[int] = []
        # split() with a group gives [text, token, text, token, …, text]
        for index, part in enumerate(self._added_pattern.split(text)):
            if index % 2:
                ids.append(self._registered[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_tokens(self, ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if not 0 <= token_id < self._num_pieces:
            return self._added_text.get(token_id, "").encode()
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes((int(piece[1:-1], 16),))
        return piece_bytes(piece)

    def token_text(self, token_id: int) -> str:
        if not 0 <= token_id < self._num_pieces:
            return self._added_text.get(token_id, "")
        piece: str = self._model.id_to_piece(token_id)
        return piece

    def token_id(self, content: str) -> int | None:
        registered = self._registered.get(content)
        return self._piece_id(content) if registered is None else registered


def _longest_of(words: list[str]) -> str:
    """A regular expression for the longest of `words` at a place.

    Shared beginnings are tried once: with a thousand plain alternatives, each "<" of a text would cost 30 µs.
    """
    prefix = os.path.commonprefix(words)  # noqa: RUF071 (by character is what is wanted)
    tails: dict[str, list[str]] = {}
    for word in words:
        if word != prefix:
            tails.setdefault(word[len(prefix)], []).append(word[len(prefix) :])
    if not tails:
        return re.escape(prefix)
    branches = "|".join(_longest_of(group) for group in tails.values())
    return f"{re.escape(prefix)}(?:{branches}){'?' if prefix in words else ''}"
