"""Logits and greedy ids against transformers' own vision-language ERNIE 4.5, on random weights in many shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie45 import ErnieModel, InvalidRequestError, SamplingOptions
from ernie45.backends.base import VisionTokens
from ernie45.backends.vision_language import VisionLanguageBackend
from ernie45.engine import media as engine_media
from ernie45.memory import media as memory_media
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.types.prompts import Prompt
from ernie45.vision import rotary_positions
from tests.vl_models import (
    NUM_TOKEN_IDS,
    clip,
    picture,
    prompt_of,
    random_reference,
    recorded_routing,
    reference_logits,
    save_reference,
    text_ids,
)

NUM_NEW_TOKENS = 8
GREEDY: SamplingOptions = {"temperature": 0.0, "max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True}


def rope(*section: int, theta: float = 100.0) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section)}


SHAPES: dict[str, dict[str, Any]] = {
    "as 28B, narrow": {"text": {"rope_parameters": rope(2, 2, 4, theta=500000.0)}},
    "experts from the first layer, none shared": {
        "text": {"mlp_layer_types": ["sparse"] * 3, "moe_num_shared_experts": 0, "rope_parameters": rope(3, 3, 2)}
    },
    "untied, head_dim above hidden / heads": {
        "text": {"head_dim": 32, "tie_word_embeddings": False, "rope_parameters": rope(6, 6, 4)},
        "tie_word_embeddings": False,
    },
    "pictures' experts wider than the text's": {"text": {"moe_intermediate_size": [12, 44], "moe_k": 1}},
    "biases": {"text": {"use_bias": True, "num_key_value_heads": 4}},
    "two dense layers first, most frequencies in time": {
        "text": {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "rope_parameters": rope(1, 1, 6),
            "moe_norm_min": 0.6,
        }
    },
    "every second layer, another tower": {
        "text": {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "num_hidden_layers": 4},
        "vision": {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 36, "rms_norm_eps": 1e-3},
    },
    "odd widths, every expert": {
        "text": {"hidden_size": 45, "moe_intermediate_size": [13, 7], "moe_num_experts": 4, "moe_k": 4},
        "vision": {"hidden_size": 24, "num_heads": 3},
    },
}
PROMPTS: dict[str, Prompt] = {
    "text": prompt_of(text_ids(20)),
    "a picture": prompt_of(text_ids(5), picture(4, 6), text_ids(7, seed=1)),
    "three pictures of different aspect": prompt_of(
        [101], picture(2, 12, seed=1), picture(8, 2, seed=2), picture(6, 6, seed=3), text_ids(4, seed=2)
    ),
    "picture, text, picture": prompt_of(text_ids(3), picture(4, 4, seed=4), text_ids(6, seed=3), picture(2, 6, seed=5)),
    "a clip": prompt_of(text_ids(6, seed=4), clip(4, 4, 6, seed=6), text_ids(3, seed=5)),
    "a clip and a picture": prompt_of([101], clip(2, 4, 4, seed=7), text_ids(2), picture(4, 2, seed=8), [102]),
}


@pytest.fixture(params=SHAPES, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[tuple[Any, ErnieModel]]:
    reference = random_reference(seed=len(request.param), **SHAPES[request.param])
    folder = save_reference(reference, tmp_path_factory.mktemp("vl"), tokenizer_folder)
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
        yield reference, model


@pytest.fixture(scope="module")
def plain_pair(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[tuple[Any, ErnieModel, Path]]:
    reference = random_reference()
    folder = save_reference(reference, tmp_path_factory.mktemp("vl"), tokenizer_folder)
    with ErnieModel.from_pretrained(folder, dtype="float32", device="cpu", progress=False) as model:
        yield reference, model, folder


def check_logits(model: ErnieModel, reference: Any, prompt: Prompt) -> None:
    torch.testing.assert_close(model.logits(prompt), reference_logits(reference, prompt), atol=1e-4, rtol=0)


def test_logits(pair: tuple[Any, ErnieModel], monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = pair
    assert model.load_report.unknown_config_keys == ()
    num_layers = reference.config.text_config.mlp_layer_types.count("sparse")
    for name, prompt in PROMPTS.items():
        with recorded_routing(monkeypatch) as calls:
            logits = model.logits(prompt)
        difference = (logits - reference_logits(reference, prompt)).abs().max()
        assert difference < 1e-4, (name, difference)
        routed = sum(item.media.num_tokens + 2 for item in prompt.media)
        sizes = [len(prompt) - routed, *[routed] * bool(prompt.media)] * num_layers
        assert [len(chosen) for _, chosen in calls] == sizes
        assert len({router for router, _ in calls}) == len(sizes)


def test_greedy_ids_alone_and_in_a_ragged_batch(pair: tuple[Any, ErnieModel]) -> None:
    reference, model = pair
    prompts = list(PROMPTS.values())
    together = [reply.token_ids for reply in model.batch_generate(prompts, **GREEDY)]
    assert [model.generate(prompt, **GREEDY).token_ids for prompt in prompts] == together
    for prompt, reply in zip(prompts, together, strict=True):
        # One pass over prompt and reply: each token of the reply must be the reference's first choice at its place.
        whole = dataclasses.replace(prompt, token_ids=prompt.token_ids + reply[:-1])
        logits = reference_logits(reference, whole)[len(prompt) - 1 :, :NUM_TOKEN_IDS]
        assert tuple(logits.argmax(-1).tolist()) == reply
        assert len(reply) == NUM_NEW_TOKENS


def test_the_answer_depends_on_the_picture_and_its_place(pair: tuple[Any, ErnieModel]) -> None:
    _, model = pair
    first, second = picture(4, 6, seed=1), picture(4, 6, seed=2)
    answers = [
        model.logits(prompt_of([101], *media, [102, 103]), positions=[-1])
        for media in [(first, second), (second, first), (first, first), (picture(6, 4, seed=1), second)]
    ]
    for index, answer in enumerate(answers):
        assert all((answer - other).abs().max() > 0.01 for other in answers[:index])


# Mistakes made on purpose, which the comparison must see

Tokens = Callable[[engine_media.SequenceMedia, int, int, torch.device], VisionTokens | None]


def _markers_to_text(tokens: Tokens) -> Tokens:
    def changed(media: engine_media.SequenceMedia, start: int, end: int, device: torch.device) -> VisionTokens | None:
        found = tokens(media, start, end, device)
        assert found is not None
        markers = found.routed[~torch.isin(found.routed, found.embedded)]
        text = torch.cat((found.text, markers)).sort().values
        return dataclasses.replace(found, text=text, routed=found.embedded)

    return changed


def test_markers_routed_to_text_would_be_seen(
    plain_pair: tuple[Any, ErnieModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model, _ = plain_pair
    prompt = PROMPTS["a picture"]
    expected = reference_logits(reference, prompt)
    monkeypatch.setattr(engine_media.SequenceMedia, "tokens", _markers_to_text(engine_media.SequenceMedia.tokens))
    assert (model.logits(prompt) - expected).abs().max() > 0.01


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_of_the_rotary_embedding_left_out_would_be_seen(
    plain_pair: tuple[Any, ErnieModel, Path], monkeypatch: pytest.MonkeyPatch, axis: int
) -> None:
    reference, model, _ = plain_pair
    prompt = PROMPTS["a clip"]
    expected = reference_logits(reference, prompt)

    def without(*arguments: Any, **options: Any) -> Tensor:
        positions = rotary_positions(*arguments, **options).clone()
        positions[:, axis] = positions.min(dim=1).values
        return positions

    monkeypatch.setattr(engine_media, "rotary_positions", without)
    assert (model.logits(prompt) - expected).abs().max() > 0.01


def test_each_bank_has_its_own_correction(plain_pair: tuple[Any, ErnieModel, Path], tmp_path: Path) -> None:
    reference, _, folder = plain_pair
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(folder / "model.safetensors")
    corrections = [name for name in stored if name.endswith("e_score_correction_bias")]
    assert [tuple(stored[name].shape) for name in corrections] == [(2, 8)] * 2
    text, image = PROMPTS["text"], prompt_of(picture(4, 6), [101])
    for bank in (0, 1):
        changed = {name: stored[name].index_fill(0, torch.tensor(bank), 0.0) for name in corrections}
        save_file({**stored, **changed}, tmp_path / "model.safetensors")
        with ErnieModel.from_pretrained(tmp_path, dtype="float32", device="cpu", progress=False) as model:
            text_moved = (model.logits(text) - reference_logits(reference, text)).abs().max()
            # Before the first text token only tokens of the picture have been run.
            end = prompt_of(picture(4, 6)).token_ids
            image_moved = (model.logits(image) - reference_logits(reference, image))[: len(end)].abs().max()
        moved = (float(text_moved), float(image_moved))
        assert moved[bank] > 0.02
        assert moved[1 - bank] < 1e-4


# Prompts beyond one chunk of the prefill


@pytest.mark.parametrize("first", [512 - 61, 512 - 60, 512 - 59, 480, 510, 511, 512, 513])
def test_a_picture_across_the_edge_of_a_chunk(plain_pair: tuple[Any, ErnieModel, Path], first: int) -> None:
    assert PREFILL_CHUNK_TOKENS == 512
    reference, model, _ = plain_pair
    prompt = prompt_of(text_ids(first - 1, seed=first), picture(12, 20, seed=9), text_ids(5))
    assert (prompt.media[0].first, prompt.media[0].media.num_tokens) == (first, 60)
    check_logits(model, reference, prompt)


def test_a_picture_and_a_clip_that_take_several_chunks(plain_pair: tuple[Any, ErnieModel, Path]) -> None:
    reference, model, _ = plain_pair
    parts = picture(40, 64, seed=1), text_ids(30), clip(4, 20, 36, seed=2), text_ids(9, seed=1)
    prompt = prompt_of([101], *parts)
    assert len(prompt) > 2 * PREFILL_CHUNK_TOKENS
    check_logits(model, reference, prompt)
    reply = model.generate(prompt, **GREEDY).token_ids
    assert [r.token_ids for r in model.batch_generate([PROMPTS["text"], prompt], **GREEDY)][1] == reply
    whole = dataclasses.replace(prompt, token_ids=prompt.token_ids + reply[:-1])
    logits = reference_logits(reference, whole)[len(prompt) - 1 :, :NUM_TOKEN_IDS]
    assert tuple(logits.argmax(-1).tolist()) == reply


def test_a_clip_that_is_encoded_in_parts(
    plain_pair: tuple[Any, ErnieModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model, _ = plain_pair
    monkeypatch.setattr(memory_media, "PATCHES_PER_PART", 3 * 24)  # two frames at a time, and never three
    grids: list[tuple[int, int, int]] = []
    encode = VisionLanguageBackend.encode

    def recording(backend: VisionLanguageBackend, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        grids.append(grid)
        return encode(backend, patches, grid)

    monkeypatch.setattr(VisionLanguageBackend, "encode", recording)
    prompt = prompt_of(picture(8, 10, seed=21), [101], clip(6, 4, 6, seed=22), [102])
    check_logits(model, reference, prompt)
    assert grids == [(1, 8, 10), (2, 4, 6), (2, 4, 6), (2, 4, 6)]


# A clip of more steps in time than rows and columns


def test_after_a_long_small_clip_positions_follow_baidus_rule(plain_pair: tuple[Any, ErnieModel, Path]) -> None:
    reference, model, _ = plain_pair
    # 2 text tokens and the marker at 0 to 2; the clip, of 4 steps of 1 x 2 tokens, begins at 3: its time goes up to 6.
    long = prompt_of([101, 102], clip(8, 2, 4, seed=1), [103, 104])
    ours = [[3 + step, 3, 3 + column] for step in range(4) for column in range(2)]
    expected = torch.tensor([[0] * 3, [1] * 3, [2] * 3, *ours, [7] * 3, [8] * 3, [9] * 3])
    assert torch.equal(rotary_positions(len(long), long.media, merge_size=2), expected)
    # transformers goes on after the columns, within the clip: 3 + 2.
    theirs = expected.clone()
    theirs[11:] -= 2
    logits = model.logits(long)
    torch.testing.assert_close(reference_logits(reference, long, expected), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        reference_logits(reference, long, theirs), reference_logits(reference, long), atol=1e-5, rtol=0
    )
    difference = (logits - reference_logits(reference, long)).abs().amax(-1)
    assert difference[:11].max() < 1e-4
    assert difference[11:].min() > 0.01
    # Replies go on from there, as transformers' own do: by the highest position.
    reply = model.generate(long, **GREEDY).token_ids
    whole = dataclasses.replace(long, token_ids=long.token_ids + reply[:-1])
    positions = rotary_positions(len(whole), whole.media, merge_size=2)
    assert positions[-1].tolist() == [9 + NUM_NEW_TOKENS - 1] * 3
    chosen = reference_logits(reference, whole, positions)[len(long) - 1 :, :NUM_TOKEN_IDS].argmax(-1)
    assert tuple(chosen.tolist()) == reply


def test_a_rendered_conversation_with_pictures_and_a_clip(plain_pair: tuple[Any, ErnieModel, Path]) -> None:
    from PIL import Image

    reference, model, _ = plain_pair
    shades = [Image.new("RGB", (60 + 40 * (i == 4), 90), (40 * i, 255 - 30 * i, 100)) for i in range(5)]
    first = {"role": "user", "content": ["the cat", shades[0], {"type": "video", "video": shades[1:4], "fps": 2}]}
    second = {"role": "user", "content": [{"type": "image", "image": shades[4]}, "a hat"]}
    prompt = model.render([first, {"role": "assistant", "content": "the mat"}, second])
    assert [item.media.kind for item in prompt.media] == ["image", "video", "image"]
    assert prompt.media[1].media.grid[0] == 4  # the third frame is shown twice
    check_logits(model, reference, prompt)


def test_every_way_to_ask_about_a_picture_gives_the_same(
    plain_pair: tuple[Any, ErnieModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    reference, model, _ = plain_pair
    grids: list[tuple[int, int, int]] = []
    encode = VisionLanguageBackend.encode

    def recording(backend: VisionLanguageBackend, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        grids.append(grid)
        return encode(backend, patches, grid)

    monkeypatch.setattr(VisionLanguageBackend, "encode", recording)
    image = Image.linear_gradient("L").resize((90, 60))
    first: list[Any] = [{"role": "user", "content": [image, "the cat"]}]
    again: list[Any] = [
        *first,
        {"role": "assistant", "content": "a hat"},
        {"role": "user", "content": [image, "that?"]},
    ]
    text: list[Any] = [{"role": "user", "content": "the cat"}]
    expected = [model.chat(messages, **GREEDY).token_ids for messages in (first, again, text)]
    assert [reply.token_ids for reply in model.batch_chat([first, again, text], **GREEDY)] == expected
    streamed = [chunk.token_ids for chunk in model.stream_chat(first, **GREEDY)]
    assert tuple(token_id for ids in streamed for token_id in ids) == expected[0]
    prompt = model.render(first)
    assert model.generate(prompt, **GREEDY).token_ids == expected[0]
    torch.testing.assert_close(model.logits(prompt), reference_logits(reference, prompt), atol=1e-4, rtol=0)
    with pytest.raises(InvalidRequestError, match="a score is of text"):
        model.score(prompt)
    assert grids == [(1, 4, 6)]  # all of that looked at the picture once
