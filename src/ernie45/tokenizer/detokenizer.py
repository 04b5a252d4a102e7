"""Text of one reply, put together while its tokens arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ernie45.errors import InvalidRequestError
from ernie45.tokenizer.reply_parser import MARKERS, ReplyParser, TextDelta
from ernie45.tokenizer.vocabulary import Tokenizer


class TextAssembler:
    """Turns the token ids of one reply into text to show at once, in constant time per character.

    Held back are the first bytes of an unfinished UTF-8 character and text that may be the beginning of a
    stop string. The texts from `push` and `finish` join to `tokenizer.decode(ids)`, cut before the stop
    string that is complete first (the longest, where several end at the same character), however the text
    falls into tokens.

    With `thinking` the reply begins inside `<think>` and is taken apart as `ReplyParser` says, whether its tags are
    special tokens, ordinary ones or spelt out. Stop strings then count in the answer only.

    Raises:
        InvalidRequestError: a stop string is empty or not text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), *, thinking: bool = False) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stops = _StopTexts((stop,) if isinstance(stop, str) else stop)
        self._parser = ReplyParser() if thinking else None
        markers = {tokenizer.token_id(marker): marker.encode() for marker in MARKERS} if thinking else {}
        self._markers = {token_id: marker for token_id, marker in markers.items() if token_id is not None}

    @property
    def thinking(self) -> bool:
        """Whether the reply has reasoning, be it empty."""
        return self._parser is not None

    @property
    def stopped(self) -> bool:
        """A stop string was found; the text ends before it and further tokens add nothing."""
        return self._stops.found

    def push(self, token_id: int) -> TextDelta:
        """Take the next token and return what it makes safe to show, often its own text, sometimes nothing."""
        token = self._markers.get(token_id) or self._tokenizer.token_bytes(token_id)
        return self._add(self._utf8.decode(token), final=False)

    def finish(self) -> TextDelta:
        """Return what is still held back after the last token; an unfinished character becomes U+FFFD."""
        return self._add(self._utf8.decode(b"", final=True), final=True)

    def _add(self, text: str, *, final: bool) -> TextDelta:
        if self.stopped:
            return TextDelta("")
        said = TextDelta(text) if self._parser is None else self._parser.push(text, final=final)
        return said._replace(text=self._stops.push(said.text, final=final))


class _StopTexts:
    """Lets text through up to the first stop string; holds back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._stops = [_StopString(text) for text in texts]
        self._held = ""
        self.found = False

    def push(self, text: str, *, final: bool) -> str:
        if not self._stops:
            return text
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            # Every stop string has to see the character, so no short-circuit here.
            complete = [len(stop) for stop in self._stops if stop.advance(character)]
            if complete:
                self.found, self._held = True, ""
                return seen[: end - max(complete)]
        safe = len(seen) if final else len(seen) - max(stop.matched for stop in self._stops)
        self._held = seen[safe:]
        return seen[:safe]


class _StopString:
    """Follows how much of one stop string the text ends with (Knuth, Morris and Pratt's matcher)."""

    def __init__(self, text: object) -> None:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(
                f"a stop string must be text of at least one character, not {text!r}",
                hint='e.g. stop=["\\n\\n", "User:"]; token ids go to stop_token_ids',
            )
        self._text = text
        self.matched = 0
        # _shorter[n]: the longest proper beginning of the stop string that its first n characters end with
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._extend(self._shorter[-1], character))

    def __len__(self) -> int:
        return len(self._text)

    def advance(self, character: str) -> bool:
        """Take the next character of the text; True where it completes the stop string."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self._text)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self._text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self._text[matched] == character)
