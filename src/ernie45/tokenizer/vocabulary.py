"""What a tokenizer is, and how one is loaded from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from ernie45.errors import InvalidRequestError


class Tokenizer(Protocol):
    """Text to token ids and back, for one checkpoint. Safe to use from several threads.

    Ids from `size` on have no token and must never be sampled, even where the model has logits for them.
    """

    @property
    def size(self) -> int: ...

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that contribute nothing to shown text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: no bos or eos is added, registered added tokens in it become their own ids.

        Raises:
            InvalidRequestError: the text holds half a surrogate pair, so it has no UTF-8 form.
        """
        ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes one id adds to a text; b"" for special tokens and ids without a token."""
        ...

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it ("▁the", "<0x0A>", "</s>"); "" for ids without a token."""
        ...

    def token_id(self, content: str) -> int | None:
        """Id of exactly this token, as the vocabulary writes it; None where there is none."""
        ...


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load a checkpoint folder's tokenizer; None where it has neither tokenizer.model nor tokenizer.json.

    tokenizer.model is preferred: it loads in a tenth of the time.

    Raises:
        TokenizerError: a tokenizer file is broken, or asks for what ernie45 does not do.
    """
    # The two libraries take a while to import, and a folder needs one of them.
    if (folder / "tokenizer.model").is_file():
        from ernie45.tokenizer.sentencepiece_model import SentencePieceTokenizer

        return SentencePieceTokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        from ernie45.tokenizer.tokenizer_json import JsonTokenizer

        return JsonTokenizer(folder)
    return None


def decode_tokens(tokenizer: Tokenizer, ids: Iterable[int], *, skip_special_tokens: bool) -> str:
    """The text that `Tokenizer.decode` promises, from the bytes of each token."""
    special = frozenset[int]() if skip_special_tokens else tokenizer.special_token_ids
    joined = b"".join(
        tokenizer.token_text(token_id).encode() if token_id in special else tokenizer.token_bytes(token_id)
        for token_id in ids
    )
    return joined.decode("utf-8", errors="replace")


def piece_bytes(piece: str) -> bytes:
    """The bytes an ordinary sentencepiece piece stands for: "▁" is a space."""
    return piece.replace("▁", " ").encode()


def check_encodable(text: str) -> None:
    """Raise InvalidRequestError where `text` has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds half a surrogate pair, {text[error.start]!a}, at character {error.start}",
            hint='repair it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
        ) from None
