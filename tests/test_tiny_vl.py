"""The built-in vision-language model answers unseen questions about pictures and clips, however it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ernie45 import ErnieModel, catalogue
from ernie45.backends.vision_language import VisionLanguageBackend
from ernie45.testing.tasks import Task, tasks

NAME = "ernie45/tiny-vl"
SEED = 20261
PICTURE_TASKS = ("shape", "colour", "count", "place")
ITEMS_PER_TASK = {**dict.fromkeys(PICTURE_TASKS, 50), "motion": 100, "compare": 50, "facts": 50}
LEAST_OF_PICTURES, LEAST_OF_CLIPS, LEAST_OF_TEXTS = 0.9, 0.8, 0.85
ITEMS_ASKED_SINGLY = 5
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def model() -> Iterator[ErnieModel]:
    with ErnieModel.from_pretrained(NAME, progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def items() -> dict[str, list[Task]]:
    return {name: tasks(name, number, seed=SEED, split="test") for name, number in ITEMS_PER_TASK.items()}


@pytest.fixture(scope="module")
def replies(model: ErnieModel, items: dict[str, list[Task]]) -> dict[str, list[str]]:
    return {
        name: [reply.text for reply in model.batch_chat([item.messages for item in drawn], temperature=0)]
        for name, drawn in items.items()
    }


def test_unseen_pictures_clips_and_texts_are_answered(
    items: dict[str, list[Task]], replies: dict[str, list[str]]
) -> None:
    right = {
        name: sum(text == item.answer for text, item in zip(replies[name], drawn, strict=True))
        for name, drawn in items.items()
    }
    assert sum(right[name] for name in PICTURE_TASKS) >= LEAST_OF_PICTURES * 50 * len(PICTURE_TASKS), right
    assert right["motion"] >= LEAST_OF_CLIPS * 100, right
    assert right["compare"] + right["facts"] >= LEAST_OF_TEXTS * 100, right


def test_asking_singly_and_streaming_give_the_same(
    model: ErnieModel, items: dict[str, list[Task]], replies: dict[str, list[str]]
) -> None:
    for name, drawn in items.items():
        for item, text in list(zip(drawn, replies[name], strict=True))[:ITEMS_ASKED_SINGLY]:
            assert model.chat(item.messages, temperature=0).text == text
            streamed = model.stream_chat(item.messages, temperature=0)
            assert "".join(chunk.text for chunk in streamed) == text


def test_a_second_question_about_a_picture_encodes_nothing(
    model: ErnieModel, items: dict[str, list[Task]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = VisionLanguageBackend.encode

    def counting(self: VisionLanguageBackend, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        encoded.append(len(patches))
        return encode(self, patches, grid)

    monkeypatch.setattr(VisionLanguageBackend, "encode", counting)
    picture = _a_new_picture()
    first: dict[str, Any] = {"role": "user", "content": [picture, "What shape is this?"]}
    reply = model.chat([first], temperature=0)
    assert len(encoded) == 1
    second: list[dict[str, Any]] = [
        first,
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": "What colour is the shape?"},
    ]
    assert model.chat(second, temperature=0).text == "red"
    assert reply.text == "circle"
    assert len(encoded) == 1, "the picture of the first turn is known"


def test_thinking_is_off_unless_asked_for(model: ErnieModel) -> None:
    question: dict[str, Any] = {"role": "user", "content": [_a_new_picture(), "What colour is this?"]}
    assert model.chat([question], temperature=0).reasoning is None
    thought = model.chat([question], thinking=True, temperature=0)
    assert thought.reasoning is not None
    assert thought.text == "red"
    assert not any(tag in thought.text + thought.reasoning for tag in ("<think>", "</think>"))


def test_it_ships_within_its_size(model: ErnieModel) -> None:
    entry = catalogue.find(NAME)
    assert entry is not None
    folder = catalogue.built_in_folder(entry)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    assert model.spec.vision is not None


def _a_new_picture() -> Any:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (112, 112), (248, 248, 248))
    ImageDraw.Draw(picture).ellipse((20, 20, 60, 60), fill=(220, 30, 35))
    return picture
