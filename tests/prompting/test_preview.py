"""Previews say what chatting would do: the sizes and tokens are those of the prompt that would be sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ernie45 import ErnieModel
from ernie45.engine.media import MediaEncoder
from ernie45.errors import InvalidRequestError, MediaError
from ernie45.memory.media import encoding_bytes, encoding_operations, trunk_operations
from ernie45.prompting import VisionInput
from tests.vl_models import random_reference, save_reference


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Iterator[ErnieModel]:
    """Resizes pictures to between 28 * 28 and 78,400 pixels, frames to at most 6,272."""
    folder = save_reference(random_reference(), tmp_path_factory.mktemp("vl"), tokenizer_folder)
    with ErnieModel.from_pretrained(folder, device="cpu", dtype="float32", progress=False) as model:
        yield model


def image(width: int, height: int, **options: int) -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (width, height), "red"), **options}


def clip(num_frames: int, width: int, height: int, **options: float) -> dict[str, Any]:
    return {"type": "video", "video": [Image.new("RGB", (width, height), "red")] * num_frames, **options}


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def test_sizes_and_tokens_are_those_of_the_prompt(model: ErnieModel) -> None:
    parts = [
        image(300, 200),
        image(20, 20),
        image(1000, 400),
        image(1000, 400, max_pixels=20_000),
        image(400, 1, max_pixels=784),
        clip(5, 60, 30),
        clip(100, 320, 240, fps=10),
        clip(100, 320, 240, fps=10, max_pixels=30_000),
    ]
    first, second = ask(*parts[:4]), ask(*parts[4:])
    messages = [*first, {"role": "assistant", "content": "ok"}, *second]
    previews = model.preview(messages)
    media = [item.media for item in model.render(messages).media]
    assert [(preview.resized_width, preview.resized_height) for preview in previews] == [item.size for item in media]
    assert [preview.num_tokens for preview in previews] == [item.num_tokens for item in media]
    assert [preview.num_frames for preview in previews] == [item.grid[0] for item in media]
    assert [preview.kind for preview in previews] == [item.kind for item in media]


def test_what_made_it_smaller_is_said(model: ErnieModel) -> None:
    small, large, own, frames = model.preview(
        ask(image(300, 200), image(1000, 400), image(1000, 400, max_pixels=20_000), clip(2, 640, 480))
    )
    assert (small.width, small.height, small.max_pixels) == (300, 200, None)
    assert (small.resized_width, small.resized_height) == (308, 196)
    # 1000 x 400 over sqrt(400,000 / 78,400) is 442.7 x 177.1, cut to multiples of 28.
    assert (large.resized_width, large.resized_height, large.max_pixels) == (420, 168, 78_400)
    assert (large.num_tokens, own.max_pixels, frames.max_pixels) == (15 * 6, 20_000, 6_272)
    assert str(large).startswith("image 1000 x 400 -> 420 x 168 (limit of 78,400 pixels): 90 tokens, ")


def test_memory_and_seconds_are_worked_out_from_the_grid(model: ErnieModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def rate(*arguments: Any, **shape: Any) -> float:
        asked.append((arguments, shape))
        return 1e6

    monkeypatch.setattr("ernie45.prompting.preview.product_rate", rate)
    (preview,) = model.preview(ask(image(84, 56)))
    operations = encoding_operations((1, 4, 6), model.spec) + trunk_operations(6, model.spec)
    assert preview.seconds == operations / 1e6
    assert preview.memory_bytes == encoding_bytes((1, 4, 6), model.spec, 4)
    assert asked == [(("cpu", "float32"), {"in_features": 16, "out_features": 64})]


def test_nothing_is_cut_or_encoded(model: ErnieModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        pytest.fail("it was to be looked at only")

    monkeypatch.setattr(VisionInput, "prepare", refuse)
    monkeypatch.setattr(MediaEncoder, "encode_part", refuse)
    assert len(model.preview(ask(image(300, 200), clip(2, 60, 30)))) == 2


def test_messages_without_media_cost_nothing_more(model: ErnieModel, small_model: ErnieModel) -> None:
    assert model.preview(ask()) == []
    assert small_model.preview(ask()) == []


def test_it_refuses_what_chat_refuses(model: ErnieModel, small_model: ErnieModel) -> None:
    for refused, chosen, error in (
        (ask(image(60, 40)), small_model, InvalidRequestError),
        (ask({"type": "image", "image": "no-such.png"}), model, MediaError),
        (ask(image(60, 40, max_pixels=783)), model, InvalidRequestError),
        ([{"role": "user", "content": 5}], model, InvalidRequestError),
    ):
        with pytest.raises(error) as by_chat:
            chosen.render(refused)
        with pytest.raises(error) as by_preview:
            chosen.preview(refused)
        assert str(by_preview.value) == str(by_chat.value)
