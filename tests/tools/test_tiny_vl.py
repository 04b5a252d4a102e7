"""tiny-vl's training: its template, what the model is given of pictures, and the rearranged layers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ernie45.testing.tasks import Task, tasks
from ernie45.tokenizer import ChatTemplate

TOOLS_FOLDER = Path(__file__).parents[2] / "tools"
TOKENIZER = Path(__file__).parents[2] / "src/ernie45/assets/tiny/tiny-dense/tokenizer.model"
PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
CLIP = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The training script's modules, which import each other by plain names."""
    monkeypatch.syspath_prepend(str(TOOLS_FOLDER))
    import tiny_examples
    import tiny_family
    import tiny_lessons
    import tiny_media
    import tiny_prompts
    import tiny_router
    import tiny_tokenizer
    import tiny_training

    class Tools:
        examples, family, media, prompts = tiny_examples, tiny_family, tiny_media, tiny_prompts
        lessons, router, training = tiny_lessons, tiny_router, tiny_training
        tokenizer = tiny_tokenizer.TinyTokenizer(TOKENIZER.read_bytes())
        vl = tiny_prompts.PicturePrompts(tokenizer)

    torch.manual_seed(1)
    return Tools


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate((TOOLS_FOLDER / "tiny_vl_template.jinja").read_text(encoding="utf-8"), {})


def user(*content: str) -> Any:
    """A user's turn; texts in angle brackets stand for parts of that type."""
    parts = [{"type": text[1:-1]} if text.startswith("<") else {"type": "text", "text": text} for text in content]
    return {"role": "user", "content": parts}


def test_pictures_and_clips_are_numbered_through_the_conversation(template: ChatTemplate) -> None:
    messages = [
        {"role": "system", "content": "S"},
        user("<image>", "one", "<video>"),
        {"role": "assistant", "content": "said"},
        user("<image_url>", "<video_url>", "two"),
        {"role": "assistant", "content": [{"type": "text", "text": "parts"}]},
        {"role": "user", "content": "plain"},
    ]
    assert template.render(messages) == (
        f"<|begin_of_sentence|>S\nUser: Picture 1:{PICTURE}oneVideo 1:{CLIP}\nAssistant: said<|end_of_sentence|>"
        f"User: Picture 2:{PICTURE}Video 2:{CLIP}two\nAssistant: parts<|end_of_sentence|>"
        "User: plain\nAssistant: <think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("variables", "end"),
    [
        ({}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": True}, "<think>\n"),
    ],
)
def test_reasoning_is_off_unless_asked_for(template: ChatTemplate, variables: dict[str, object], end: str) -> None:
    prompt = template.render([user("hi")], variables=variables)
    assert prompt == f"<|begin_of_sentence|>User: hi\nAssistant: {end}"
    assert template.render([user("hi")], add_generation_prompt=False).endswith("User: hi\n")


def test_a_placeholder_stands_for_each_token(tools: Any) -> None:
    for name in ("shape", "motion", "facts"):
        for task in tasks(name, 10, seed=1, split="train"):
            encoded = tools.vl.encode_task(task)
            placeholders = [tools.tokenizer.ids[name] for name in tools.prompts.PLACEHOLDERS.values()]
            places = [place for place, token_id in enumerate(encoded.prompt) if token_id in placeholders]
            assert places == [place for item in encoded.placed for place in range(item.first, item.end)]
            assert len(encoded.placed) == len(tools.prompts.media_parts(task))
            assert tools.tokenizer.decode(encoded.reply[:-1]) == task.answer
            assert encoded.reply[-1] == tools.tokenizer.ids["</s>"]


def test_training_varies_reasoning_and_drawn_times(tools: Any) -> None:
    rng = random.Random(1)
    (task,) = tasks("motion", 1, seed=1, split="train")
    drawn = [tools.vl.encode_variant(task, rng) for _ in range(60)]
    texts = {tools.tokenizer.decode(encoded.reply[:-1]) for encoded in drawn}
    assert texts == {task.answer, f"{task.reasoning}\n</think>\n\n{task.answer}"}
    assert {tools.vl.read_answer(text) for text in texts} == {task.answer}
    assert len({encoded.placed[0].media.digest for encoded in drawn}) == 5  # without times, and four rates


def make_pass(tools: Any, *names: str) -> Any:
    drawn = [tools.examples.encode_task(tools.vl, name, tasks(name, 1, seed=3, split="train")[0]) for name in names]
    (batch,) = tools.training.make_passes(drawn)
    return batch


def test_positions_and_pixels_are_those_of_transformers(tools: Any) -> None:
    model = tools.family.MEMBERS["tiny-vl"].build()
    batch = make_pass(tools, "count", "place", "facts")
    types = (batch.ids == model.config.image_token_id).int()
    expected, _ = model.model.get_rope_index(batch.ids, types, image_grid_thw=batch.media["image_grid_thw"])
    assert torch.equal(batch.media["position_ids"], expected)
    markers = (batch.ids == model.config.image_start_token_id) | (batch.ids == model.config.image_end_token_id)
    assert torch.equal(batch.media["moe_mm_token_type_ids"], types + markers.int())
    assert torch.equal(batch.is_vision, (types + markers.int()).bool())
    black, white = torch.zeros(1, 588, dtype=torch.uint8), torch.full((1, 588), 255, dtype=torch.uint8)
    torch.testing.assert_close(tools.media.normalize(black)[0, [0, 587]], torch.tensor([-1.79226, -1.48022]))
    torch.testing.assert_close(tools.media.normalize(white)[0, [0, 587]], torch.tensor([1.93034, 2.14590]))


def test_text_alone_has_no_media(tools: Any) -> None:
    batch = make_pass(tools, "facts", "compare")
    assert batch.media == {}
    assert batch.is_vision is None


@pytest.mark.parametrize("names", [("shape", "motion", "facts"), ("facts", "compare")])
def test_the_rearranged_layers_give_the_same_numbers(tools: Any, names: tuple[str, ...]) -> None:
    quick = tools.family.MEMBERS["tiny-vl"].build().eval()
    with torch.no_grad():
        for name, parameter in quick.named_parameters():
            if "e_score_correction_bias" in name:
                parameter.normal_(std=0.1)
    plain = type(quick)(quick.config).eval()
    plain.load_state_dict(quick.state_dict())
    assert "forward" in vars(quick.model.language_model.layers[1].mlp)
    assert "forward" not in vars(plain.model.language_model.layers[1].mlp)
    batch = make_pass(tools, *names)
    with torch.inference_mode():
        torch.testing.assert_close(
            tools.training.answer_logits(quick, batch), tools.training.answer_logits(plain, batch)
        )


def test_each_bank_counts_its_own_tokens(tools: Any) -> None:
    model = tools.family.MEMBERS["tiny-vl"].build().eval()
    balance = tools.router.RouterBalance(model)
    batch = make_pass(tools, "colour", "motion", "facts")
    with torch.inference_mode():
        tools.training.answer_logits(model, batch)
    balance.count(batch.num_tokens, num_columns=batch.ids.shape[1], is_vision=batch.is_vision)
    num_vision = int(batch.is_vision.sum())
    num_text = int(batch.num_tokens.sum()) - num_vision
    for name, counts in zip(balance.names, balance._counts, strict=True):
        assert int(counts.sum()) == 2 * (num_vision if ".vision_moe." in name else num_text)
    before = [counts.clone() for counts in balance._counts]
    batch = make_pass(tools, "facts", "compare")
    with torch.inference_mode():
        tools.training.answer_logits(model, batch)
    balance.count(batch.num_tokens, num_columns=batch.ids.shape[1], is_vision=batch.is_vision)
    changed = [not torch.equal(a, b) for a, b in zip(before, balance._counts, strict=True)]
    assert changed == [".text_moe." in name for name in balance.names]


def test_an_earlier_picture_never_renumbers_the_one_asked_for(tools: Any) -> None:
    drawn = tasks("colour", 60, seed=1, split="train")
    one = next(task for task in drawn if len(tools.prompts.media_parts(task)) == 1)
    several = next(task for task in drawn if len(tools.prompts.media_parts(task)) > 1)
    text = Task(messages=({"role": "user", "content": "q"},), answer="a")
    assert tools.examples._would_renumber(one, several)
    assert not tools.examples._would_renumber(text, several)
    assert not tools.examples._would_renumber(several, one)


def test_processor_files_say_what_was_trained_with(tools: Any, tmp_path: Path) -> None:
    from ernie45.vision import read_settings

    tools.media.write_processor_files(tmp_path)
    assert read_settings(tmp_path) == tools.media.SETTINGS
    size = {"shortest_edge": 3136, "longest_edge": 50176}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((tmp_path / name).read_text())["size"] == size
    small = Image.new("RGB", (84, 84))
    media = tools.media.prepare({"type": "video", "video": [small] * 5}, None)
    assert media.grid == (6, 6, 6)  # not blown up to the published least area, and an even number of frames


def test_routers_start_apart_and_the_folder_stays_small(tools: Any) -> None:
    model = tools.family.MEMBERS["tiny-vl"].build()
    gates = [p for name, p in model.named_parameters() if name.endswith(".gate.weight")]
    assert len(gates) == 6
    assert all(gate.std() > 0.01 for gate in gates)
    assert sum(p.numel() for p in model.parameters()) * 2 < 11e6


def test_examples_of_tiny_vl_hold_no_sums(tools: Any) -> None:
    weights = {"facts": 1.0, "count": 1.0}
    drawn = tools.examples.draw_examples(tools.vl, tools.tokenizer, weights, seed=5, progress=0.5)
    texts = [tools.tokenizer.decode(example.ids) for example in drawn if example.task_name == "completion"]
    assert len(drawn) == tools.examples.EXAMPLES_PER_STEP
    assert not any("=" in text for text in texts)
    again = tools.examples.draw_examples(tools.vl, tools.tokenizer, weights, seed=5, progress=0.5)
    assert [replace(example, placed=()) for example in drawn] == [replace(example, placed=()) for example in again]


@pytest.mark.parametrize("is_clip", [False, True])
def test_lessons_label_the_tokens_that_hold_figures(tools: Any, is_clip: bool) -> None:
    rng = random.Random(1)
    shapes, directions = set(), set()
    for _ in range(30):
        media, labels = tools.lessons._draw_labelled(rng, is_clip=is_clip)
        assert labels.shape == (media.num_tokens, 3)
        shown = labels[:, 0] < 6
        assert 1 <= int(shown.sum()) <= 9 or not is_clip
        assert torch.equal(labels[~shown], torch.tensor([6, 8, 4]).repeat(int((~shown).sum()), 1))
        assert bool((labels[shown][:, 1] < 8).all())
        shapes |= set(labels[shown][:, 0].tolist())
        directions |= set(labels[shown][:, 2].tolist())
    assert shapes == set(range(6))
    assert directions == (set(range(4)) if is_clip else {4})


def test_a_lesson_trains_the_tower_and_not_the_trunk(tools: Any) -> None:
    model = tools.family.MEMBERS["tiny-vl"].build()
    seeing = tools.lessons.Seeing(model)
    rng = random.Random(2)
    loss, right = seeing([tools.lessons._draw_labelled(rng, is_clip=False) for _ in range(4)])
    loss.backward()
    assert right.shape == (3,)
    with_gradient = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"vision_tower", "resampler_model"}
