from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import InvalidRequestError
from ernie45.tokenizer import TextAssembler, load_tokenizer
from ernie45.tokenizer.vocabulary import decode_tokens


class FakeTokenizer:
    """Ids are places in a list of byte strings; None is a special token, which `names` may give a name."""

    def __init__(self, tokens: Sequence[bytes | None], names: Mapping[str, int] | None = None) -> None:
        self._tokens = tokens
        self._names = names or {}
        self.size = len(tokens)
        self.special_token_ids = frozenset(i for i, token in enumerate(tokens) if token is None)

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return decode_tokens(self, ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] or b""

    def token_text(self, token_id: int) -> str:
        return f"<{token_id}>"

    def token_id(self, content: str) -> int | None:
        return self._names.get(content)


def pieces(tokens: Sequence[bytes | None], stop: str | Sequence[str] = ()) -> list[str]:
    """What each token releases, and at last what finish() does."""
    assembler = TextAssembler(FakeTokenizer(tokens), stop)
    return [*(assembler.push(i).text for i in range(len(tokens))), assembler.finish().text]


def test_emoji_waits_for_its_last_byte() -> None:
    assert pieces([b"a", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\n"]) == ["a", "", "", "", "😀", "\n", ""]


def test_unfinished_character_becomes_a_replacement_character_at_the_end() -> None:
    assert pieces([b"a", b"\xf0", b"\x9f"]) == ["a", "", "", "\ufffd"]


def test_first_token_keeps_its_space_and_special_tokens_add_nothing() -> None:
    assert pieces([b" Hi", None, b" you"]) == [" Hi", "", " you", ""]


def test_special_token_within_a_character() -> None:
    assert pieces([b"\xc3", None, b"\xa9"]) == ["", "", "é", ""]


def test_stop_string_over_three_tokens() -> None:
    assert pieces([b"one #", b"#", b"# two", b"more"], ["###"]) == ["one ", "", "", "", ""]


def test_stopped_tells_when() -> None:
    assembler = TextAssembler(FakeTokenizer([b"a\nU", b"ser", b": x"]), ["\nUser:"])
    seen = [(assembler.push(i).text, assembler.stopped) for i in range(3)]
    assert seen == [("a", False), ("", False), ("", True)]
    assert assembler.push(2) == assembler.finish() == ("", "")


def test_held_text_that_was_no_stop_string_is_released() -> None:
    assert pieces([b"a#", b"#b", b"#"], ["###"]) == ["a", "##b", "", "#"]


def test_stop_string_that_begins_again_within_itself() -> None:
    assert "".join(pieces([b"xaab", b"aab", b"aac!"], ["aabaac"])) == "xaab"


def test_stop_string_that_is_complete_first_wins_and_then_the_longest() -> None:
    assert "".join(pieces([b"xabcd"], ["abcd", "bc"])) == "xa"
    assert "".join(pieces([b"xabcd"], ["bcd", "abcd"])) == "x"


def test_stop_string_of_a_replacement_character() -> None:
    assembler = TextAssembler(FakeTokenizer([b"a", b"\xf0"]), "\ufffd")
    deltas = [assembler.push(0), assembler.push(1), assembler.finish()]
    assert [delta.text for delta in deltas] == ["a", "", ""]
    assert assembler.stopped


@pytest.mark.parametrize("stop", [[""], [3], ""])
def test_bad_stop_strings_are_refused(stop: Sequence[str]) -> None:
    with pytest.raises(InvalidRequestError, match="stop string"):
        TextAssembler(FakeTokenizer([]), stop)


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=20))
def test_pieces_join_to_the_decoded_text_for_any_bytes_and_split(data: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    tokens = [data[a:b] for a, b in pairwise(edges)]
    assert "".join(pieces(tokens)) == data.decode("utf-8", errors="replace")


@given(
    text=st.text("abé", max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_text_is_cut_at_the_stop_string_for_any_split(text: str, stops: list[str], seed: int) -> None:
    data, rng, tokens = text.encode(), random.Random(seed), []
    while data:
        size = rng.randrange(1, 6)
        tokens.append(data[:size])
        data = data[size:]
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    longest = max((len(stop) for stop in stops if ends and text[: ends[0]].endswith(stop)), default=0)
    expected = text[: ends[0] - longest] if ends else text
    released = pieces(tokens, stops)
    assert "".join(released) == expected
    for count in range(len(released)):  # never more than the final text
        assert expected.startswith("".join(released[:count]))


def test_released_as_soon_as_it_is_safe() -> None:
    assert pieces([b"abc", b"d", b"e"], ["cx"]) == ["ab", "cd", "e", ""]


def test_a_long_reply_with_a_long_stop_string_takes_linear_time() -> None:
    """Quadratic work on this input would take minutes."""
    stop = "a" * 20_000 + "b"
    assert "".join(pieces([b"a" * 50] * 2_000, [stop])) == "a" * 100_000


def test_same_text_as_the_published_tokenizer_decodes(published_folder: Path) -> None:
    tokenizer = load_tokenizer(published_folder)
    assert tokenizer is not None
    rng = random.Random(0)
    for _ in range(200):
        ids = rng.choices(range(103_424), k=20) + rng.choices(range(13, 269), k=20)
        rng.shuffle(ids)
        assembler = TextAssembler(tokenizer)
        deltas = [*map(assembler.push, ids), assembler.finish()]
        assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
        assert {delta.reasoning for delta in deltas} == {""}


# A thinking model's replies

REPLY = "<think>\nwhy 你?\n</think>\n\n<response>\nso 好\n</response>\n"
TAGS = ["<think>", "</think>", "<response>", "</response>"]


def tokenized(reply: str, *, tags_are: str) -> FakeTokenizer:
    """A token for each byte, and for each tag: one that is "special", one that is "added", or none ("spelt")."""
    tokens: list[bytes | None] = []
    names: dict[str, int] = {}
    for part in re.split(f"({'|'.join(TAGS)})", reply):
        if part in TAGS and tags_are != "spelt":
            names[part] = len(tokens)
            tokens.append(None if tags_are == "special" else part.encode())
        else:
            tokens += [bytes([byte]) for byte in part.encode()]
    return FakeTokenizer(tokens, names)


def said(tokenizer: FakeTokenizer, stop: Sequence[str] = (), thinking: bool = True) -> tuple[str, str, bool]:
    assembler = TextAssembler(tokenizer, stop, thinking=thinking)
    assert assembler.thinking == thinking
    deltas = [*(assembler.push(i) for i in range(tokenizer.size)), assembler.finish()]
    return "".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), assembler.stopped


@pytest.mark.parametrize("tags_are", ["special", "added", "spelt"])
def test_reasoning_is_found_however_its_tags_are_registered(tags_are: str) -> None:
    assert said(tokenized(REPLY, tags_are=tags_are)) == ("so 好", "why 你?", False)
    plain = said(tokenized(REPLY, tags_are=tags_are), thinking=False)
    assert plain == (re.sub("|".join(TAGS), "", REPLY) if tags_are == "special" else REPLY, "", False)


@pytest.mark.parametrize("tags_are", ["special", "added", "spelt"])
def test_stop_strings_count_in_the_answer_only(tags_are: str) -> None:
    reply = "\nwait. 4.\n</think>\n\n<response>\nIt is 4. Or not.\n</response>"
    assert said(tokenized(reply, tags_are=tags_are), ["4."]) == ("It is ", "wait. 4.", True)
    assert said(tokenized(reply, tags_are=tags_are), ["wait", "\n", "think"]) == ("It is 4. Or not.", "wait. 4.", False)


def test_half_a_character_before_a_tag_is_a_replacement_character() -> None:
    tokens = FakeTokenizer([b"a", b"\xe4\xbd", None, b"b", b"\xe4"], {"</think>": 2})
    assert said(tokens) == ("b\ufffd", "a\ufffd", False)
