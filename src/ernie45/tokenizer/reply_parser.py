"""The reply of a thinking model, taken apart into reasoning and answer while its text arrives."""

from __future__ import annotations

from typing import Literal, NamedTuple

THINK, THINK_END = "<think>", "</think>"
RESPONSE, RESPONSE_END = "<response>", "</response>"
# What gives a reply its structure. A checkpoint may register these as special tokens or not at all.
MARKERS = (THINK, THINK_END, RESPONSE, RESPONSE_END, "<tool_call>", "</tool_call>")


class TextDelta(NamedTuple):
    """What one step added: to the text that is shown, and to the reasoning before it."""

    text: str
    reasoning: str = ""


class ReplyParser:
    """Takes a reply apart whose prompt ends in an open `<think>`.

    Up to `</think>` it is reasoning. After it the answer stands between `<response>` and `</response>`, or is all the
    rest; what follows `</response>` (a tool call, say) comes after the answer, on a line of its own. Newlines around
    each part are no part of it. A reply that is cut before `</think>` is reasoning and nothing else.

    The deltas join to the same two texts however the reply falls into pieces. Held back is only what may still turn
    out to be a tag, or newlines to drop.
    """

    def __init__(self) -> None:
        self._stage: Literal["start", "reasoning", "answer", "response", "rest"] = "start"
        self._held = ""
        self._begun = False  # something of the present part was given out: newlines before the next are part of it
        self._answered = False

    def push(self, piece: str, *, final: bool = False) -> TextDelta:
        """Take the reply's next piece, the last one if `final`; return what it makes sure."""
        self._held += piece
        text = reasoning = ""
        if self._stage == "start" and self._skip_tag(THINK, final) is not None:  # some models repeat it
            self._stage = "reasoning"
        if self._stage == "reasoning":
            reasoning, ended = self._take_until(THINK_END, final)
            self._stage = "answer" if ended else "reasoning"
        if self._stage == "answer":
            found = self._skip_tag(RESPONSE, final)
            if found is not None:
                self._stage = "response" if found else "rest"
        if self._stage == "response":
            text, ended = self._take_until(RESPONSE_END, final)
            self._answered = self._answered or bool(text)
            self._stage = "rest" if ended else "response"
        if self._stage == "rest":
            rest, _ = self._take_until("", final)
            if rest and self._answered:
                self._answered = False
                rest = "\n" + rest
            text += rest
        return TextDelta(text, reasoning)

    def _skip_tag(self, tag: str, final: bool) -> bool | None:
        """Whether `tag` stands here, after white space, and now is skipped; None while that is open."""
        bare = self._held.lstrip(" \r\n")
        if bare.startswith(tag):
            self._held = bare.removeprefix(tag)
            return True
        return None if not final and tag.startswith(bare) else False

    def _take_until(self, tag: str, final: bool) -> tuple[str, bool]:
        """What surely belongs to the part that `tag` ends ("": nothing ends it), and whether it has ended."""
        if not self._begun:
            self._held = self._held.lstrip("\n")
        taken, found, rest = self._held.partition(tag) if tag else (self._held, "", "")
        if found or final:
            self._held = rest
            taken = taken.rstrip("\n")
        else:
            sure = _sure_length(taken, tag)
            taken, self._held = taken[:sure], taken[sure:]
        self._begun = not found and (self._begun or bool(taken))
        return taken, bool(found)


def split_reply(reply: str) -> TextDelta:
    """Answer and reasoning of a whole reply."""
    return ReplyParser().push(reply, final=True)


def _sure_length(text: str, tag: str) -> int:
    """How much of `text` comes before newlines at its end and before what may be the beginning of `tag`."""
    last = text.rfind("<")
    if tag and last >= 0 and tag.startswith(text[last:]):
        text = text[:last]
    return len(text.rstrip("\n"))
