from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.tokenizer.reply_parser import MARKERS, ReplyParser, split_reply

CALL = "<tool_call>\n{}\n</tool_call>"
# What the model may write after the "<think>\n" of its prompt; then the answer and the reasoning.
REPLIES = [
    ("2 + 2 = 4\n</think>\n\n<response>\n4\n</response>\n", "4", "2 + 2 = 4"),
    ("2 + 2 = 4\n</think>\n\n4", "4", "2 + 2 = 4"),
    ("2 + 2 = 4\n</think>4\n", "4", "2 + 2 = 4"),
    ("2 + 2 = 4</think><response>4</response>", "4", "2 + 2 = 4"),
    ("\na\n\nb\n\n</think>\n\n<response>\n\nc\n\nd\n\n</response>\n\n", "c\n\nd", "a\n\nb"),
    ("<think>\nagain\n</think>\nyes", "yes", "again"),
    ("\n<think>again</think>yes", "yes", "again"),
    ("a <think> b\n</think>\n\nc", "c", "a <think> b"),
    ("</think>\n\nno thoughts", "no thoughts", ""),
    ("\n</think>\n\n<response>\nno thoughts\n</response>", "no thoughts", ""),
    (f"a\n</think>\n\n{CALL}\n", CALL, "a"),
    (f"a\n</think>\n\n{CALL}\n\n\n{CALL}\n", f"{CALL}\n\n\n{CALL}", "a"),
    (f"a\n</think>\n\n<response>\nb\n</response>\n\n\n{CALL}\n", f"b\n{CALL}", "a"),
    (f"a\n</think>\n\n<response>\n</response>\n{CALL}\n", CALL, "a"),
    ("a\n</think>\n\n<response>\nb\n</response>c\n</response>", "b\nc\n</response>", "a"),
    ("a\n</think>\n\nSay <response> and </response>", "Say <response> and </response>", "a"),
    ("a\n</think>\n\nthat was </think>", "that was </think>", "a"),
    ("a <b> </b>\n</thin k>\n</think>\n\n<respond>", "<respond>", "a <b> </b>\n</thin k>"),
    ("a</think> \r\n<response>\nb\n</response>\n", "b", "a"),
    (" <think>a</think>  b", "  b", "a"),
    ("cut off while thinking\n", "", "cut off while thinking"),
    ("cut off in the tag\n</thi", "", "cut off in the tag\n</thi"),
    ("a\n</think>\n\n<response>\ncut off\n", "cut off", "a"),
    ("a\n</think>\n\n<response>\ncut off\n</resp", "cut off\n</resp", "a"),
    ("a\n</think>\n\n<resp", "<resp", "a"),
    ("a\n</think>\n\n<response>", "", "a"),
    ("a\n</think>\n", "", "a"),
    ("<thi", "", "<thi"),
    ("\n\n", "", ""),
    ("", "", ""),
]


def read(pieces: Iterable[str]) -> tuple[str, str]:
    """Answer and reasoning, from the reply in pieces."""
    parser = ReplyParser()
    deltas = [*(parser.push(piece) for piece in pieces), parser.push("", final=True)]
    return "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas)


def cut(reply: str, places: Iterable[int]) -> list[str]:
    return [reply[a:b] for a, b in pairwise([0, *sorted(places), len(reply)])]


@pytest.mark.parametrize(("reply", "text", "reasoning"), REPLIES)
def test_a_reply_comes_apart_the_same_however_it_is_cut(reply: str, text: str, reasoning: str) -> None:
    assert split_reply(reply) == (text, reasoning)
    assert read(reply) == (text, reasoning)  # a character at a time
    places = range(len(reply) + 1)
    for one in places:
        assert read(cut(reply, [one])) == (text, reasoning), one
    for two in combinations(places, 2):
        assert read(cut(reply, two)) == (text, reasoning), two


SNIPPETS = st.sampled_from([*MARKERS, "\n", "\n\n", "<", "</", "<r", "think>", "</respons", "a", " ", "你"])
TEXTS = st.lists(SNIPPETS, max_size=14).map("".join)


def in_one_look(reply: str) -> tuple[str, str]:
    """The grammar once more, on the whole reply."""
    reasoning, ended, rest = re.sub(r"\A[ \r\n]*<think>", "", reply).partition("</think>")
    if not ended:
        return "", reasoning.strip("\n")
    opening = re.match(r"[ \r\n]*<response>", rest)
    if not opening:
        return rest.strip("\n"), reasoning.strip("\n")
    inside, _, after = rest[opening.end() :].partition("</response>")
    return "\n".join(part.strip("\n") for part in (inside, after) if part.strip("\n")), reasoning.strip("\n")


@given(reply=TEXTS, places=st.lists(st.integers(0, 60), max_size=12))
def test_any_text_in_any_pieces(reply: str, places: list[int]) -> None:
    expected = in_one_look(reply)
    assert read(cut(reply, [min(place, len(reply)) for place in places])) == expected
    assert read(reply) == expected


@given(reply=TEXTS)
def test_nothing_is_held_back_that_is_sure(reply: str) -> None:
    last = reply.rfind("<")
    if reply.endswith((" ", "\n")) or (last >= 0 and any(tag.startswith(reply[last:]) for tag in MARKERS)):
        return
    assert ReplyParser().push(reply) == in_one_look(reply)
    parser = ReplyParser()
    deltas = [parser.push(character) for character in reply]
    assert "".join(delta.text for delta in deltas) == in_one_look(reply)[0]
    assert "".join(delta.reasoning for delta in deltas) == in_one_look(reply)[1]


def test_reasoning_and_answer_come_as_soon_as_they_are_sure() -> None:
    parser = ReplyParser()
    pieces = ["\n", "so", "\n", "\n", "4", "\n", "</", "b", "\n</", "think>", "\n\n<", "response>\n", "4", "\n</", "x"]
    assert [parser.push(piece)[::-1] for piece in pieces] == [
        ("", ""),
        ("so", ""),
        ("", ""),
        ("", ""),
        ("\n\n4", ""),
        ("", ""),
        ("", ""),
        ("\n</b", ""),
        ("", ""),
        ("", ""),
        ("", ""),
        ("", ""),
        ("", "4"),
        ("", ""),
        ("", "\n</x"),
    ]
