"""Pictures and clips in conversations: whatever the template's form, the same prompt comes out."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie45.errors import InvalidRequestError, MediaError, TemplateError, TokenizerError, UnsupportedError
from ernie45.prompting import Prompter, VisionInput
from ernie45.tokenizer import ERNIE45_TEMPLATE, ChatTemplate, load_tokenizer
from ernie45.types.limits import MediaLimits
from ernie45.vision import VisionSettings
from tests.vl_models import IDS, add_text_side

IMAGE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"

# What the published templates do: parts of one name or the other, numbered through the conversation.
PARTS = """\
{%- set count = namespace(image=0, video=0) -%}
<|begin_of_sentence|>
{%- for turn in messages -%}
{{ "User: " if turn.role == "user" else "Assistant: " if turn.role == "assistant" else "" }}
{%- if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content -%}
    {%- if part.type == "text" %}{{ part.text }}
    {%- elif part.type == IMAGE_PART -%}
        {%- set count.image = count.image + 1 -%}
        Picture {{ count.image }}:<|IMAGE_START|>IMAGE_PLACE<|IMAGE_END|>
    {%- elif part.type == VIDEO_PART -%}
        {%- set count.video = count.video + 1 -%}
        Video {{ count.video }}:<|VIDEO_START|>VIDEO_PLACE<|VIDEO_END|>
    {%- endif -%}
{%- endfor %}{% endif %}
{{- "<|end_of_sentence|>" if turn.role == "assistant" else "\\n" -}}
{%- endfor -%}
{{ "Assistant: " }}"""


def parts_template(image: str, video: str, image_place: str, video_place: str) -> str:
    places = {"IMAGE_PLACE": image_place, "VIDEO_PLACE": video_place}
    source = PARTS
    for name, text in {"IMAGE_PART": f'"{image}"', "VIDEO_PART": f'"{video}"', **places}.items():
        source = source.replace(name, text)
    return source


TEMPLATES = {
    "parts": parts_template("image", "video", "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"),
    "parts of URLs": parts_template("image_url", "video_url", "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"),
    "texts only": ERNIE45_TEMPLATE,
    "Baidu's names": parts_template("image_url", "video_url", "<|image@placeholder|>", "<|video@placeholder|>"),
}
THINKING = "{{ '<think>' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}"


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    add_text_side(folder, tokenizer_folder)
    return folder


MakePrompter = Callable[[str], Prompter]


@pytest.fixture
def prompter_with(vision_folder: Path) -> MakePrompter:
    return lambda template: make_prompter(vision_folder, template)


def make_prompter(folder: Path, template: str) -> Prompter:
    settings = VisionSettings(min_pixels=784, min_frame_pixels=784, max_frame_pixels=8 * 784)
    return Prompter(
        tokenizer=load_tokenizer(folder),
        template=ChatTemplate(template, {}),
        vocab_size=384,
        vision=VisionInput(settings=settings, max_pixels=50 * 784, max_frame_pixels=6 * 784, limits=MediaLimits()),
    )


def picture(width: int = 60, height: int = 80, colour: tuple[int, int, int] = (200, 30, 90)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def clip(num_frames: int = 3) -> dict[str, Any]:
    return {"type": "video", "video": [picture(56, 56)] * num_frames, "fps": 2}


# What is rendered


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_form_of_template_gives_the_same_prompt(
    prompter_with: MakePrompter, vision_folder: Path, template: str
) -> None:
    prompter = prompter_with(TEMPLATES[template])
    messages = [
        {"role": "system", "content": "the mat"},
        user(picture(), "the cat", clip(), picture(100, 30)),
        {"role": "assistant", "content": "a hat"},
        user("and ", {"type": "image_url", "image_url": picture(30, 30)}, clip(2), {"type": "text", "text": "?"}),
    ]
    prompt = prompter.from_messages(messages)
    expected = (
        f"<|begin_of_sentence|>the mat\nUser: Picture 1:{IMAGE}the catVideo 1:{VIDEO}Picture 2:{IMAGE}\n"
        f"Assistant: a hat<|end_of_sentence|>User: and Picture 3:{IMAGE}Video 2:{VIDEO}?\nAssistant: "
    )
    baidus = expected.replace("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>")
    baidus = baidus.replace("<|VIDEO_PLACEHOLDER|>", "<|video@placeholder|>")
    assert prompt.text == (baidus if template == "Baidu's names" else expected)
    kinds = [item.media.kind for item in prompt.media]
    assert kinds == ["image", "video", "image", "image", "video"]
    assert [item.media.grid for item in prompt.media] == [(1, 6, 4), (4, 4, 4), (1, 2, 8), (1, 2, 2), (2, 4, 4)]
    # Each placeholder once for each of its tokens, and all else as the tokenizer has it.
    counts = iter(item.media.num_tokens for item in prompt.media)
    written = re.sub(r"<\|(IMAGE|VIDEO)_PLACEHOLDER\|>", lambda found: found[0] * next(counts), expected)
    tokenizer = load_tokenizer(vision_folder)
    assert tokenizer is not None
    assert list(prompt.token_ids) == tokenizer.encode(written)
    for item in prompt.media:
        name = item.media.kind.upper()
        assert prompt.token_ids[item.first - 1] == IDS[f"<|{name}_START|>"]
        assert set(prompt.token_ids[item.first : item.end]) == {IDS[f"<|{name}_PLACEHOLDER|>"]}
        assert prompt.token_ids[item.end] == IDS[f"<|{name}_END|>"]


def test_text_alone_is_rendered_as_ever_and_has_no_media(prompter_with: MakePrompter) -> None:
    for template in TEMPLATES.values():
        prompt = prompter_with(template).from_messages([user("the ", "cat")])
        assert (prompt.text, prompt.media) == ("<|begin_of_sentence|>User: the cat\nAssistant: ", ())


def test_the_same_picture_from_every_source_is_the_same(prompter_with: MakePrompter, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "cat.png"
    path.write_bytes(file.getvalue())
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        image,
        pixels,
        file.getvalue(),
        path,
        {"type": "image", "image": str(path)},
        {"type": "image", "image": uri},
        {"type": "image_url", "image_url": uri},
        {"type": "image_url", "image_url": {"url": uri, "detail": "auto"}},
    ]
    prompter = prompter_with(ERNIE45_TEMPLATE)
    digests = {prompter.from_messages([user(part)]).media[0].media.digest for part in parts}
    assert len(digests) == 1
    pixels[0, 0, 0] ^= 1
    assert prompter.from_messages([user(pixels)]).media[0].media.digest not in digests


def test_limits_of_pixels_are_the_parts_own_or_the_models(prompter_with: MakePrompter) -> None:
    prompter = prompter_with(ERNIE45_TEMPLATE)
    large = picture(600, 600)
    frames = [picture(600, 600)] * 2
    parts = [
        large,
        {"type": "image", "image": large, "max_pixels": 5 * 784},
        {"type": "video", "video": frames, "fps": 1},
        {"type": "video", "video": frames, "fps": 1, "max_pixels": 784},
    ]
    grids = [item.media.grid for item in prompter.from_messages([user(*parts)]).media]
    assert grids == [(1, 14, 14), (1, 4, 4), (2, 4, 4), (2, 2, 2)]  # at most 50, 5, 6 and 1 tokens of 28 x 28


def test_a_tokenizer_with_one_placeholder_for_pictures_and_clips(tmp_path: Path, tokenizer_folder: Path) -> None:
    ids = {name: number for name, number in IDS.items() if name != "<|VIDEO_PLACEHOLDER|>"}
    add_text_side(tmp_path, tokenizer_folder, ids)
    for template in TEMPLATES.values():
        prompt = make_prompter(tmp_path, template).from_messages([user(picture(), clip())])
        for item in prompt.media:
            assert set(prompt.token_ids[item.first : item.end]) == {IDS["<|IMAGE_PLACEHOLDER|>"]}
        assert prompt.token_ids[prompt.media[1].first - 1] == IDS["<|VIDEO_START|>"]


@pytest.mark.parametrize("name", [name for name in IDS if name != "<|VIDEO_PLACEHOLDER|>"])
def test_a_tokenizer_that_lacks_a_marker(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    add_text_side(tmp_path, tokenizer_folder, {other: number for other, number in IDS.items() if other != name})
    prompter = make_prompter(tmp_path, ERNIE45_TEMPLATE)
    with pytest.raises((TokenizerError, TemplateError)) as caught:
        prompter.from_messages([user(picture(), clip())])
    assert name in str(caught.value)
    assert caught.value.hint
    assert prompter.from_messages([user("the cat")]).media == ()


# What is refused


@pytest.mark.parametrize("marker", [*IDS, "<|image@placeholder|>", "<|video@placeholder|>"])
@pytest.mark.parametrize("beside", [(), (picture(),)], ids=["alone", "beside a picture"])
def test_markers_in_a_text_are_refused(prompter_with: MakePrompter, marker: str, beside: tuple[Any, ...]) -> None:
    prompter = prompter_with(ERNIE45_TEMPLATE)
    with pytest.raises(InvalidRequestError, match="the text of message 1 holds") as caught:
        prompter.from_messages([user("hi"), user(*beside, f"see {marker} there")])
    assert marker in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a <|IMAGE_PLACEHOLDER|>"},
        {"role": "assistant", "content": "a", "thoughts": "<|IMAGE_PLACEHOLDER|>"},
        {"role": "assistant", "content": "<think>\n<|IMAGE_PLACEHOLDER|>\n</think>\na"},
        {"role": "system", "content": "<|IMAGE_PLACEHOLDER|>"},
        {"role": "user", "content": ["<|IMAGE_PLACE", {"type": "text", "text": "HOLDER|>"}]},
    ],
)
@pytest.mark.parametrize("template", [ERNIE45_TEMPLATE, ERNIE45_TEMPLATE + THINKING], ids=["plain", "thinking"])
def test_markers_are_refused_wherever_they_stand(
    prompter_with: MakePrompter, message: dict[str, Any], template: str
) -> None:
    with pytest.raises(InvalidRequestError, match=r"the text of message 0 holds '<\|IMAGE_PLACEHOLDER\|>'"):
        prompter_with(template).from_messages([message, user("hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{% for turn in messages %}{{ turn.role }}{% endfor %}",
        "{% for turn in messages %}{{ turn.content | length }}{% endfor %}",
        TEMPLATES["parts"].replace("<|VIDEO_PLACEHOLDER|>", "").replace("turn.content is string", "false"),
        # Only the first picture, and clips before pictures.
        f"{{% if messages[0].content is not string %}}{IMAGE}{VIDEO}{{% endif %}}",
        f"{VIDEO}{IMAGE}{IMAGE}",
    ],
)
def test_a_template_that_loses_or_moves_a_picture_is_refused(prompter_with: MakePrompter, template: str) -> None:
    with pytest.raises(TemplateError) as caught:
        prompter_with(template).from_messages([user(picture(), picture(), clip())])
    assert caught.value.hint


@pytest.mark.parametrize(
    "template",
    ["<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|> <|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
     "<|IMAGE_START|><|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|>\n<|IMAGE_END|>",
     "<|VIDEO_START|><|IMAGE_PLACEHOLDER|><|VIDEO_END|>"],
)  # fmt: skip
def test_a_placeholder_stands_between_its_markers(prompter_with: MakePrompter, template: str) -> None:
    with pytest.raises(TemplateError, match="puts a image elsewhere than between") as caught:
        prompter_with("{{ '' }}" + template + " x").from_messages([user(picture())])
    assert caught.value.hint


def test_the_template_is_asked_before_a_picture_is_opened(prompter_with: MakePrompter) -> None:
    missing = {"type": "image", "image": "no-such-file.png"}
    with pytest.raises(TemplateError):
        prompter_with("{{ messages[0].role }}").from_messages([user(missing)])
    with pytest.raises(MediaError, match=r"no-such-file\.png"):
        prompter_with(ERNIE45_TEMPLATE).from_messages([user(missing)])


# Reasoning


@pytest.mark.parametrize("template", TEMPLATES)
def test_reasoning_is_switched_by_the_template(prompter_with: MakePrompter, template: str) -> None:
    prompter = prompter_with(TEMPLATES[template] + THINKING)
    messages = [user(picture(), "the cat?")]
    off, asked_off, on = (prompter.from_messages(messages, thinking=thinking) for thinking in (None, False, True))
    assert (off.thinking, asked_off.thinking, on.thinking) == (False, False, True)
    assert (off.text, off.token_ids) == (asked_off.text, asked_off.token_ids)
    assert off.text.endswith("Assistant: <think>\n\n</think>\n\n")
    assert on.text.endswith("Assistant: <think>")
    assert [len(prompt.media) for prompt in (off, asked_off, on)] == [1, 1, 1]
    with pytest.raises(UnsupportedError, match="does not think"):
        prompter_with(TEMPLATES[template]).from_messages(messages, thinking=True)


def test_reasoning_in_a_history_with_pictures_is_left_out(prompter_with: MakePrompter) -> None:
    prompter = prompter_with(TEMPLATES["parts"] + THINKING)
    question, later = user(picture(), "cat?"), user(clip(), "hat?")
    plain = {"role": "assistant", "content": "yes"}
    raw: Mapping[str, Any] = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    expected = prompter.from_messages([question, plain, later])
    assert "hm" not in expected.text
    for answer in (raw, {**plain, "thoughts": "hm"}):
        prompt = prompter.from_messages([question, answer, later])
        assert (prompt.text, prompt.token_ids) == (expected.text, expected.token_ids)
        assert [item.media.kind for item in prompt.media] == ["image", "video"]


def test_a_rendered_prompt_keeps_its_media_for_completion(prompter_with: MakePrompter) -> None:
    prompter = prompter_with(ERNIE45_TEMPLATE)
    prompt = prompter.from_messages([user(picture(), "the cat?")])
    assert prompter.from_prompt(prompt) == prompt
    assert json.dumps(prompt.token_ids)  # plain numbers


def test_ids_and_text_that_stand_for_a_picture_are_refused_without_it(prompter_with: MakePrompter) -> None:
    prompter = prompter_with(TEMPLATES["parts"] if "parts" in TEMPLATES else next(iter(TEMPLATES.values())))
    prompt = prompter.from_messages([user(picture(), "the cat")])
    assert prompter.from_prompt(prompt).media == prompt.media
    with pytest.raises(InvalidRequestError, match="stands for a picture or clip") as caught:
        prompter.from_prompt(prompt.token_ids)
    assert "render()" in caught.value.hint
    with pytest.raises(InvalidRequestError, match="marks pictures and clips"):
        prompter.from_prompt(prompt.text)
