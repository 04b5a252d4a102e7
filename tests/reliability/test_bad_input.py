"""Every bad input ends in one class of ernie45.errors that names what failed and what to do, with nothing half done."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45 import ErnieModel, Prompt
from ernie45.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    CorruptFileError,
    ErnieError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    TemplateError,
    TensorError,
    TokenizerError,
    UnsupportedError,
)

Folder = Callable[..., Path]


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ernie45-engine"}


def check(error_class: type[ErnieError], shown: tuple[str, ...], call: Callable[[], object]) -> None:
    before = engine_threads()
    with pytest.raises(ErnieError) as caught:
        call()
    assert type(caught.value) is error_class
    for part in shown:
        assert part in caught.value.message
    assert caught.value.hint
    assert engine_threads() <= before


# Checkpoints


@pytest.fixture
def folder(make_checkpoint: Folder, tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", num_shards=2)


SHARD = "model-00002-of-00002.safetensors"


def remove_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def cut_shard(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) - 100])


def cut_header(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:50])


def empty_shard(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")


def reshape(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / SHARD)


def integers(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / SHARD)


def entry(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(content))


def void(_: object) -> None:
    pass


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


BROKEN_FOLDERS: list[tuple[str, Callable[[Path], None], type[ErnieError], tuple[str, ...]]] = [
    ("missing shard", remove_shard, TensorError, ("1 of 2", SHARD)),
    ("truncated weights", cut_shard, CorruptFileError, (SHARD, "expected", "cut short")),
    ("truncated header", cut_header, CorruptFileError, (SHARD, "50")),
    ("empty shard", empty_shard, CorruptFileError, (SHARD,)),
    ("wrong shape", reshape, TensorError, ("shape", "needs")),
    ("integer weights", integers, UnsupportedError, ("I8", "quantised")),
    ("shapes of another config", entry("hidden_size", 48), TensorError, ("[384, 32]", "[384, 48]")),
    ("more layers than stored", entry("num_hidden_layers", 3), TensorError, ("model.layers.2.",)),
    ("fewer layers than stored", entry("num_hidden_layers", 1), TensorError, ("model.layers.1.",)),
    ("biases that are not there", entry("use_bias", True), TensorError, ("bias",)),
    ("unknown model_type", entry("model_type", "llama"), ConfigError, ("'llama'",)),
    ("neutral key", entry("sliding_window", 4096), ConfigError, ("sliding_window", "4096")),
    ("no JSON", write("config.json", "{"), ConfigError, ("config.json",)),
    ("no object", write("config.json", "[]"), ConfigError, ("config.json",)),
    ("no config.json", lambda folder: (folder / "config.json").unlink(), ConfigError, ("config.json",)),
    ("generation_config", write("generation_config.json", '{"top_p": 7}'), ConfigError, ("top_p", "7")),
    ("no index", write("model.safetensors.index.json", "{}"), CorruptFileError, ("weight_map",)),
    ("only pickles", only_pickles, CheckpointError, ("pytorch_model.bin",)),
    ("tokenizer.model", write("tokenizer.model", "version https://git-lfs"), TokenizerError, ("tokenizer.model",)),
    ("tokenizer_config", write("tokenizer_config.json", "{"), TokenizerError, ("tokenizer_config.json",)),
    ("endless template", write("chat_template.jinja", "x" * 70000), TemplateError, ("70000",)),
]


@pytest.mark.parametrize(
    ("break_it", "error_class", "shown"),
    [case[1:] for case in BROKEN_FOLDERS],
    ids=[case[0] for case in BROKEN_FOLDERS],
)
def test_broken_folder(
    folder: Path, break_it: Callable[[Path], None], error_class: type[ErnieError], shown: tuple[str, ...]
) -> None:
    break_it(folder)
    check(error_class, shown, lambda: ErnieModel.from_pretrained(folder, progress=False))


LOAD_ARGUMENTS: list[tuple[dict[str, Any], type[ErnieError], tuple[str, ...]]] = [
    ({"memory": "lots"}, InvalidRequestError, ("'lots'",)),
    ({"memory": "12 parsecs"}, InvalidRequestError, ("'12 parsecs'",)),
    ({"memory": "-1GiB"}, InvalidRequestError, ("'-1GiB'",)),
    ({"memory": ""}, InvalidRequestError, ("''",)),
    ({"memory": 12}, InvalidRequestError, ("12",)),
    ({"memory": {"cpu": "much"}}, InvalidRequestError, ("'much'",)),
    ({"memory": {"cuda:0": "much"}}, InvalidRequestError, ("'much'",)),
    ({"memory": {"gpu": "1GiB"}}, InvalidRequestError, ("'gpu'",)),
    ({"memory": "1kB"}, OutOfMemoryError, ("0.0 MiB",)),
    ({"context_tokens": 0}, InvalidRequestError, ("256", "0")),
    ({"context_tokens": 257}, InvalidRequestError, ("256", "257")),
    ({"context_tokens": 12.5}, InvalidRequestError, ("12.5",)),
    ({"max_batch": 0}, InvalidRequestError, ("0",)),
    ({"max_batch": "two"}, InvalidRequestError, ("'two'",)),
    ({"device": "tpu"}, UnsupportedError, ("'tpu'",)),
    ({"device": "meta"}, UnsupportedError, ("'meta'",)),
    ({"device": "cuda:99"}, UnsupportedError, ("'cuda:99'",)),
    ({"device": None}, UnsupportedError, ("None",)),
    ({"dtype": "float64"}, UnsupportedError, ("'float64'",)),
    ({"dtype": torch.float32}, UnsupportedError, ("torch.float32",)),
    ({"quantization": "int3"}, InvalidRequestError, ("'int3'",)),
]


@pytest.mark.parametrize(
    ("arguments", "error_class", "shown"), LOAD_ARGUMENTS, ids=[str(case[0]) for case in LOAD_ARGUMENTS]
)
def test_bad_argument_of_from_pretrained(
    small_folder_path: Path, arguments: dict[str, Any], error_class: type[ErnieError], shown: tuple[str, ...]
) -> None:
    check(error_class, shown, lambda: ErnieModel.from_pretrained(small_folder_path, progress=False, **arguments))


@pytest.mark.parametrize(
    "arguments", [{"memory": "lots"}, {"dtype": "float64"}, {"device": "tpu"}, {"quantization": "x"}]
)
def test_a_bad_argument_is_told_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr("ernie45.loading.resolve", lambda *_, **__: pytest.fail("went to look for the checkpoint"))
    with pytest.raises(ErnieError):
        ErnieModel.from_pretrained("baidu/ERNIE-4.5-0.3B-PT", **arguments)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "", "no-such-model"])
def test_missing_checkpoint(name: str) -> None:
    error_class = ModelNotFoundError if name else InvalidRequestError
    check(error_class, (name.removeprefix("./"),), lambda: ErnieModel.from_pretrained(name))


# Requests

PROMPTS: list[tuple[Any, tuple[str, ...]]] = [
    ("", ("empty",)),
    ([], ("empty",)),
    (None, ("NoneType",)),
    (7, ("int",)),
    (b"bytes", ("bytes",)),
    ({"prompt": "x"}, ("dict",)),
    (["the", "cat"], ("'the'",)),
    ([{"role": "user", "content": "hi"}], ("role",)),
    ([5, 6.5], ("6.5",)),
    ([5, True], ("True",)),
    ([5, 384], ("384",)),
    ([-1], ("-1", "384")),
    ("half a pair \ud83d", ("surrogate",)),
    (Prompt(text="", token_ids=()), ("empty",)),
    (Prompt(text="of another model", token_ids=(5, 90000)), ("90000", "384")),
]


@pytest.mark.parametrize(("prompt", "shown"), PROMPTS, ids=[repr(case[0]) for case in PROMPTS])
def test_bad_prompt(small_model: ErnieModel, prompt: Any, shown: tuple[str, ...]) -> None:
    calls: list[Callable[[Any], object]] = [
        small_model.generate,
        small_model.stream_generate,
        small_model.astream_generate,
        small_model.logits,
        small_model.score,
    ]
    for call in calls:
        check(InvalidRequestError, shown, lambda call=call: call(prompt))  # type: ignore[misc]
    if not isinstance(prompt, dict):
        check(InvalidRequestError, shown, lambda: small_model.batch_generate(["fine", prompt]))
    still_usable(small_model)


@pytest.mark.parametrize("prompts", [[], (), "a text", b"bytes", None, 7, {"prompt": "x"}])
def test_bad_prompt_list(small_model: ErnieModel, prompts: Any) -> None:
    check(InvalidRequestError, ("prompts",), lambda: small_model.batch_generate(prompts))
    check(InvalidRequestError, ("conversations",), lambda: small_model.batch_chat(prompts))


OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"temperature": -0.5}, ("temperature", "-0.5")),
    ({"temperature": "hot"}, ("temperature", "'hot'")),
    ({"temperature": float("nan")}, ("temperature", "nan")),
    ({"top_p": 0}, ("top_p", "0")),
    ({"top_p": 2}, ("top_p", "2")),
    ({"top_k": -1}, ("top_k", "-1")),
    ({"min_p": 1.5}, ("min_p", "1.5")),
    ({"seed": -1}, ("seed", "-1")),
    ({"logprobs": 21}, ("logprobs", "21")),
    ({"logit_bias": {384: 1.0}}, ("384",)),
    ({"logit_bias": {"a": 1.0}}, ("'a'",)),
    ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
    ({"max_new_tokens": -3}, ("max_new_tokens", "-3")),
    ({"max_new_tokens": 1.5}, ("max_new_tokens", "1.5")),
    ({"max_new_tokens": True}, ("max_new_tokens", "True")),
    ({"stop": ""}, ("stop", "''")),
    ({"stop": ["a", ""]}, ("stop",)),
    ({"stop": 5}, ("stop", "5")),
    ({"stop": ["a", 5]}, ("stop", "5")),
    ({"stop_token_ids": 5}, ("stop_token_ids", "5")),
    ({"stop_token_ids": ["</s>"]}, ("stop_token_ids", "</s>")),
    ({"tempurature": 1.0}, ("'tempurature'",)),
]


@pytest.mark.parametrize(("options", "shown"), OPTIONS, ids=[str(case[0]) for case in OPTIONS])
def test_bad_option(small_model: ErnieModel, options: dict[str, Any], shown: tuple[str, ...]) -> None:
    messages = [{"role": "user", "content": "hi"}]
    calls: list[Callable[[], object]] = [
        lambda: small_model.generate([5], **options),
        lambda: small_model.stream_generate([5], **options),
        lambda: small_model.astream_generate([5], **options),
        lambda: small_model.batch_generate([[5], {"prompt": [6], **options}]),
        lambda: small_model.chat(messages, **options),
        lambda: small_model.stream_chat(messages, **options),
    ]
    for call in calls:
        check(InvalidRequestError, shown, call)
    still_usable(small_model)


def test_longer_than_the_context(small_model: ErnieModel) -> None:
    assert small_model.context_tokens == 256
    cases: list[tuple[tuple[str, ...], Callable[[], object]]] = [
        (("256", "at least 1"), lambda: small_model.generate([7] * 256)),
        (("300", "256"), lambda: small_model.generate([7] * 300)),
        (("200", "57", "256"), lambda: small_model.generate([7] * 200, max_new_tokens=57)),
        (("200", "57", "256"), lambda: small_model.batch_generate([[7], {"prompt": [7] * 200, "max_new_tokens": 57}])),
        (("257", "256"), lambda: small_model.logits([7] * 257)),
        (("257", "256"), lambda: small_model.score([7] * 257)),
        (("256",), lambda: small_model.chat([{"role": "user", "content": "cat " * 400}])),
    ]
    for shown, call in cases:
        check(ContextLengthError, shown, call)
    still_usable(small_model)


@pytest.mark.parametrize("positions", [[3], [-4], [0, 9], ["0"], [1.0], [True], 2, "12"])
def test_bad_positions(small_model: ErnieModel, positions: Any) -> None:
    shown = repr(positions) if not isinstance(positions, list) else repr(positions[-1])
    check(InvalidRequestError, (shown,), lambda: small_model.logits([5, 6, 7], positions=positions))


def test_a_score_of_one_token(small_model: ErnieModel) -> None:
    check(InvalidRequestError, ("two tokens", "1"), lambda: small_model.score([5]))


CONVERSATIONS: list[tuple[Any, tuple[str, ...]]] = [
    ([], ("empty",)),
    ("hi", ("str",)),
    (None, ("NoneType",)),
    ({"role": "user", "content": "hi"}, ("dict",)),
    (["hi"], ("message 0", "'hi'")),
    ([{"role": "user"}], ("message 0", "user")),
    ([{"content": "hi"}], ("message 0", "hi")),
    ([{"role": "user", "content": "hi"}, {"role": "robot", "content": "beep"}], ("message 1", "'robot'")),
    ([{"role": ["user"], "content": "hi"}], ("message 0",)),
    ([{"role": "user", "content": None}], ("message 0", "NoneType")),
    ([{"role": "user", "content": 7}], ("message 0", "int")),
    ([{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], ("message 0", "'image'")),
    ([{"role": "user", "content": [{"type": "text"}]}], ("message 0",)),
    ([{"role": "user", "content": [5]}], ("message 0", "int")),
]


@pytest.mark.parametrize(("messages", "shown"), CONVERSATIONS, ids=[repr(case[0]) for case in CONVERSATIONS])
def test_bad_messages(small_model: ErnieModel, messages: Any, shown: tuple[str, ...]) -> None:
    for call in (small_model.chat, small_model.stream_chat, small_model.astream_chat, small_model.render):
        check(InvalidRequestError, shown, lambda call=call: call(messages))  # type: ignore[misc]
    check(
        InvalidRequestError,
        shown,
        lambda: small_model.batch_chat([[{"role": "user", "content": "fine"}], messages]),
    )
    still_usable(small_model)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "the chat template"),
        ("{{ raise_exception('no system message') }}", "no system message"),
        ("{{ messages[0].content.upper }", "compiled"),
        ("{{ messages.__class__.__mro__ }}", "the chat template"),
        ("", "empty"),
    ],
)
def test_bad_template(make_checkpoint: Folder, tmp_path: Path, template: str, shown: str) -> None:
    folder = make_checkpoint(tmp_path, num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(template)
    with ErnieModel.from_pretrained(folder, device="cpu", progress=False) as model:
        check(TemplateError, (shown,), lambda: model.chat([{"role": "user", "content": "hi"}]))
        still_usable(model)


def still_usable(model: ErnieModel) -> None:
    assert model.generate([5], max_new_tokens=1, temperature=0, ignore_eos=True).finish_reason == "length"
