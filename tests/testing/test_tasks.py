"""The tiny family's task generators: repeatable, split by content, answered rightly."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pytest

from ernie45.errors import InvalidRequestError
from ernie45.testing import task_words
from ernie45.testing.task_facts import RELATIONS
from ernie45.testing.task_items import SUMS, chinese_numeral
from ernie45.testing.tasks import Task, task_names, tasks

NAMES = task_names("ernie45/tiny-moe")
TEMPLATE = Path(__file__).parents[2] / "src/ernie45/assets/tiny/tiny-dense/chat_template.jinja"


def draw(name: str, n: int = 80, seed: int = 7, split: str = "test") -> list[Task]:
    return tasks(name, n, seed=seed, split=split)


def prompt_of(task: Task) -> str:
    return str(task.messages[-1]["content"])


def test_ten_tasks_of_tiny_dense() -> None:
    assert task_names("ernie45/tiny-dense") == (
        "arithmetic",
        "compare",
        "reverse",
        "sort",
        "facts",
        "extract",
        "copy_replace",
        "recall",
        "tools",
        "numerals",
    )


def test_tiny_moe_has_sums_as_well() -> None:
    assert len(NAMES) == 11
    assert NAMES[:-1] == task_names("ernie45/tiny-dense")
    assert NAMES[-1] == "sums"


@pytest.mark.parametrize("name", NAMES)
def test_as_many_as_asked_and_reasoning_for_sums_alone(name: str) -> None:
    drawn = draw(name, n=50)
    assert len(drawn) == 50
    assert {bool(task.reasoning) for task in drawn} == {name == "sums"}


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_items(name: str) -> None:
    assert draw(name) == draw(name)
    assert draw(name) != draw(name, seed=8)
    assert draw(name, n=3) == draw(name)[:3]


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_prompt(name: str) -> None:
    seen = {str(task.messages) for task in draw(name, n=400, split="train")}
    assert not seen & {str(task.messages) for task in draw(name)}


def test_split_looks_at_content_not_wording() -> None:
    sums = {split: {task.answer for task in draw("arithmetic", 2000, split=split)} for split in ("train", "test")}
    assert not sums["train"] & sums["test"]
    assert len(sums["test"]) > 1000
    sentences = {
        split: {re.split("[:：] ?", prompt_of(task))[-1] for task in draw("copy_replace", 100, split=split)}
        for split in ("train", "test")
    }
    assert not sentences["train"] & sentences["test"]
    three = {split: {task.reasoning for task in draw("sums", 4000, split=split)} for split in ("train", "test")}
    assert not three["train"] & three["test"]
    assert len(three["test"]) > 3900


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_ready_for_chat(name: str) -> None:
    for task in draw(name):
        assert all(set(message) == {"role", "content"} for message in task.messages)
        roles = [message["role"] for message in task.messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert task.answer == task.answer.strip()
        assert len(task.answer) > 0


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"tools"}))
def test_some_prompts_are_chinese(name: str) -> None:
    chinese = sum(bool(re.search("[一-鿿]", prompt_of(task).replace("百", ""))) for task in draw(name))
    assert 0.1 < chinese / 80 < 0.9


def test_unknown_model() -> None:
    with pytest.raises(InvalidRequestError, match="tiny-huge"):
        task_names("ernie45/tiny-huge")


@pytest.mark.parametrize(
    ("name", "n", "split"), [("riddles", 1, "test"), ("sort", 0, "test"), ("sort", 1, "validation")]
)
def test_unusable_arguments(name: str, n: int, split: str) -> None:
    with pytest.raises(InvalidRequestError):
        tasks(name, n, seed=1, split=split)


def test_arithmetic() -> None:
    answers = set()
    for task in draw("arithmetic", 400):
        first, sign, second, _, result = task.answer.split(" ")
        a, b = int(first), int(second)
        assert int(result) == (a + b if sign == "+" else a - b)
        assert 0 <= a <= 99
        assert 0 <= b <= 99
        assert sorted(re.findall(r"\d+", prompt_of(task))) == sorted([first, second])
        answers.add((sign, int(result) < 0))
    assert answers == {("+", False), ("-", False), ("-", True)}


def test_sums_are_reasoned_in_two_steps() -> None:
    wordings = Counter[str]()
    for task in draw("sums", 400):
        given = re.findall(r"\d+", prompt_of(task))
        a, b, c = (int(text) for text in given)
        assert max(a, b, c) <= 99
        assert task.answer == str(a + b + c)
        assert task.reasoning == f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}"
        wordings[re.sub(r"\d+", "_", prompt_of(task))] += 1
    assert set(wordings) == {re.sub(r"\{.\}", "_", text) for texts in SUMS for text in texts}
    chinese = sum(count for wording, count in wordings.items() if re.search("[一-鿿]", wording))
    assert 0.18 < chinese / 400 < 0.32


def test_compare() -> None:
    for task in draw("compare"):
        given = [int(text) for text in re.findall(r"\d+", prompt_of(task))]
        larger = re.search("larger|bigger|大", prompt_of(task)) is not None
        assert int(task.answer) == (max(given) if larger else min(given))
        assert len(set(given)) == 2
        assert max(given) < 1000


def test_reverse() -> None:
    for task in draw("reverse"):
        word = max(re.findall("[A-Z]+", prompt_of(task)), key=len)
        assert task.answer == "".join(reversed(word))
        assert 4 <= len(word) <= 8


def test_sort() -> None:
    for task in draw("sort"):
        given = sorted(int(text) for text in re.findall(r"\d+", prompt_of(task)))
        assert [int(text) for text in task.answer.split(", ")] == given
        assert len(given) == 4
        assert given[-1] < 100


def test_facts_asks_sixty_facts_in_every_split() -> None:
    answers = {row[place] for relation in RELATIONS for row in relation.facts for place in (1, 3)}
    assert sum(len(relation.facts) for relation in RELATIONS) == 60
    for split in ("train", "test"):
        drawn = draw("facts", 800, split=split)
        assert {task.answer for task in drawn} <= answers
        assert len({prompt_of(task) for task in drawn}) > 100
    for relation in RELATIONS:
        subjects = [row[0] for row in relation.facts]
        assert len(set(subjects)) == len(subjects)


def test_extract() -> None:
    for task in draw("extract"):
        found = json.loads(task.answer)
        assert list(found) == ["name", "age", "city"]
        assert found["name"] in task_words.NAMES
        assert found["city"] in task_words.CITIES
        assert 1 <= found["age"] <= 99
        assert all(str(value) in prompt_of(task) for value in found.values())


def test_copy_replace() -> None:
    lengths = Counter[int]()
    for task in draw("copy_replace", 250):
        instruction, sentence = re.split("[:：] ?", prompt_of(task))
        before, after = sentence.rstrip(".").split(), task.answer.rstrip(".").split()
        changed = [place for place, word in enumerate(before) if word != after[place]]
        assert len(before) == len(after)
        assert len(changed) == 1
        assert changed[0] > 0
        assert before[changed[0]] in instruction
        assert after[changed[0]] in instruction
        assert len(set(before)) == len(before)
        lengths[len(before)] += 1
    assert set(lengths) == set(range(8, 41))


def test_recall_answers_with_what_was_said_two_turns_earlier() -> None:
    for task in draw("recall"):
        assert len(task.messages) == 5
        value = task.answer.rstrip(".。")
        said = task.messages[0]["content"].rstrip(".。")
        shared = next(n for n in range(min(len(value), len(said)), 0, -1) if value[-n:] == said[-n:])
        assert shared >= 1
        assert task.messages[2]["content"] != task.messages[0]["content"]


def test_tools_offers_three_and_calls_one_of_them() -> None:
    kinds = Counter[str]()
    for task in draw("tools"):
        offered = json.loads(task.messages[0]["content"].removeprefix("<tool_list>\n").removesuffix("\n</tool_list>"))
        calls = task.answer if len(task.messages) == 2 else task.messages[2]["content"]
        call = json.loads(calls.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in offered}
        assert len(schemas) == 3
        assert list(call["arguments"]) == list(schemas[call["name"]])
        for name, value in call["arguments"].items():
            assert schemas[call["name"]][name]["type"] == ("integer" if isinstance(value, int) else "string")
            assert str(value) in task.messages[1]["content"]
        if len(task.messages) == 4:
            result = json.loads(prompt_of(task).removeprefix("<tool_output>\n").removesuffix("\n</tool_output>"))
            assert all(str(value) in task.answer for value in result.values())
        kinds["call" if len(task.messages) == 2 else "reply"] += 1
    assert min(kinds.values()) > 20


@pytest.mark.parametrize(
    ("number", "numeral"),
    [
        (0, "零"),
        (7, "七"),
        (10, "十"),
        (15, "十五"),
        (20, "二十"),
        (99, "九十九"),
        (100, "一百"),
        (105, "一百零五"),
        (110, "一百一十"),
        (111, "一百一十一"),
        (347, "三百四十七"),
        (900, "九百"),
    ],
)
def test_chinese_numeral(number: int, numeral: str) -> None:
    assert chinese_numeral(number) == numeral


def test_chinese_numerals_are_distinct() -> None:
    assert len({chinese_numeral(number) for number in range(1000)}) == 1000


def test_numerals() -> None:
    for task in draw("numerals"):
        digits = re.findall(r"\d+", prompt_of(task) + task.answer)
        assert len(digits) == 1
        assert chinese_numeral(int(digits[0])) in (prompt_of(task) if task.answer.isdigit() else task.answer)


def test_word_lists() -> None:
    assert len(set(task_words.NAMES)) == len(task_words.NAMES) >= 100
    assert len(set(task_words.CITIES)) == len(task_words.CITIES) >= 100
    lists = (
        task_words.ADJECTIVES,
        task_words.NOUNS,
        task_words.VERBS,
        task_words.ADVERBS,
        task_words.PREPOSITIONS,
        task_words.CONNECTORS,
    )
    sentence_words = [word for words in lists for word in words]
    assert len(set(sentence_words)) == len(sentence_words)
    assert all(set(word) <= set(string.ascii_lowercase) for word in sentence_words)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(messages=messages, tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_template_writes_structured_tools_as_the_plain_messages_do(system: str) -> None:
    task = next(task for task in draw("tools") if len(task.messages) == 4)
    tool_list, question, call, output = (message["content"] for message in task.messages)
    called = json.loads(call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    structured: list[dict[str, Any]] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": called}]},
        {"role": "tool", "content": output.removeprefix("<tool_output>\n").removesuffix("\n</tool_output>")},
    ]
    plain: list[dict[str, Any]] = list(task.messages)
    if system:
        structured.insert(0, {"role": "system", "content": system})
        plain[0] = {"role": "system", "content": f"{system}\n{tool_list}"}
    tools = json.loads(tool_list.removeprefix("<tool_list>\n").removesuffix("\n</tool_list>"))
    assert render(structured, tools) == render(plain)
    called["arguments"] = json.dumps(called["arguments"])
    assert render(structured, tools) == render(plain)


def test_template_renders_plain_messages_as_the_family_does() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
    assert render(messages) == (
        "<|begin_of_sentence|>S\nUser: hi\nAssistant: hello<|end_of_sentence|>User: bye\nAssistant: "
    )
