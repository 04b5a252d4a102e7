"""The built-in dense model does what its card says, by every way of asking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ernie45 import ErnieModel, catalogue
from ernie45.testing import Task, task_names, tasks

NAME = "ernie45/tiny-dense"
SEED = 20260
ITEMS_PER_TASK = 100
ITEMS_ASKED_SINGLY = 25


@pytest.fixture(scope="module")
def model() -> Iterator[ErnieModel]:
    with ErnieModel.from_pretrained(NAME) as model:
        yield model


@pytest.fixture(scope="module")
def items() -> dict[str, list[Task]]:
    return {name: tasks(name, ITEMS_PER_TASK, seed=SEED, split="test") for name in task_names(NAME)}


@pytest.fixture(scope="module")
def replies(model: ErnieModel, items: dict[str, list[Task]]) -> dict[str, list[str]]:
    asked = [item.messages for drawn in items.values() for item in drawn]
    texts = iter([reply.text for reply in model.batch_chat(asked, temperature=0)])
    return {name: [next(texts) for _ in drawn] for name, drawn in items.items()}


def test_unseen_items_are_answered_exactly(items: dict[str, list[Task]], replies: dict[str, list[str]]) -> None:
    right = {
        name: sum(text == item.answer for text, item in zip(replies[name], drawn, strict=True))
        for name, drawn in items.items()
    }
    assert len(right) == 10
    assert min(right.values()) >= 0.90 * ITEMS_PER_TASK, right
    assert sum(right.values()) >= 0.95 * ITEMS_PER_TASK * len(right), right


@pytest.mark.slow
def test_asking_singly_and_streaming_give_the_same_texts(
    model: ErnieModel, items: dict[str, list[Task]], replies: dict[str, list[str]]
) -> None:
    for name, drawn in items.items():
        for item, text in list(zip(drawn, replies[name], strict=True))[:ITEMS_ASKED_SINGLY]:
            assert model.chat(item.messages, temperature=0).text == text
            assert "".join(chunk.text for chunk in model.stream_chat(item.messages, temperature=0)) == text


def test_it_ships_within_its_size(model: ErnieModel) -> None:
    entry = catalogue.find(NAME)
    assert entry is not None
    folder: Path = catalogue.built_in_folder(entry)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
    assert model.spec.vocab_size > model.tokenizer.size, "rows above the tokenizer exist, to be masked"
