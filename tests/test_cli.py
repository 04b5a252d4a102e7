from __future__ import annotations

import builtins
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ernie45 import ErnieModel, list_models, plan_memory
from ernie45.cli import describe_usage, main
from ernie45.testing import scripted_model
from ernie45.types.results import Usage

SAMPLING = ["--temperature", "1.5", "--top-p", "1.0", "--seed", "3", "--max-new-tokens", "12"]
OPTIONS: dict[str, Any] = {"temperature": 1.5, "top_p": 1.0, "seed": 3, "max_new_tokens": 12}


@pytest.fixture
def place(small_folder_path: Path) -> list[str]:
    return ["--model", str(small_folder_path), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], dict[str, Any]]]:
    """The messages and options of every chat call, in order."""
    seen: list[tuple[list[Any], dict[str, Any]]] = []
    real = ErnieModel.stream_chat

    def stream_chat(self: ErnieModel, messages: Any, **options: Any) -> Any:
        seen.append((list(messages), options))
        return real(self, messages, **options)

    monkeypatch.setattr(ErnieModel, "stream_chat", stream_chat)
    return seen


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> Iterator[str | BaseException]:
    """Answer `input` with these lines; an exception is raised."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    return typed


def test_generate_prints_the_reply(
    place: list[str], small_model: ErnieModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "the cat", *place, *SAMPLING]) == 0
    out, err = capsys.readouterr()
    assert out == small_model.generate("the cat", **OPTIONS).text + "\n"
    assert err == ""


def test_generate_prints_each_piece_at_once(place: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(io.StringIO):
        shown: list[str] = []  # noqa: RUF012 (one test's)

        def flush(self) -> None:
            self.shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Recorder())
    assert main(["generate", "the cat", *place, *SAMPLING]) == 0
    assert len(set(Recorder.shown)) > 5


def test_generate_reads_standard_input_for_a_dash(
    place: list[str],
    small_model: ErnieModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the hat\n"))
    assert main(["generate", "-", *place, *SAMPLING]) == 0
    assert capsys.readouterr().out == small_model.generate("the hat\n", **OPTIONS).text + "\n"


def test_usage_goes_to_standard_error(
    place: list[str], small_model: ErnieModel, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = small_model.generate("the cat", **OPTIONS).usage
    assert main(["generate", "the cat", *place, *SAMPLING, "--usage"]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new, first after")
    assert err.count("\n") == 1


def test_usage_in_words() -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=7, seconds_to_first_token=0.256, tokens_per_second=123.4)
    assert describe_usage(usage) == "5 prompt tokens, 7 new, first after 0.26 s, 123 tokens/s"
    assert describe_usage(Usage(prompt_tokens=5, completion_tokens=0)) == "5 prompt tokens, 0 new"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["generate", "hi", "--model", "./no-such-folder"], "no-such-folder"),
        (["chat", "hi", "--model", "./no-such-folder"], "no-such-folder"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--dtype", "float64"], "float64"),
        (["generate", ""], "empty"),
        (["chat", "hi", "--max-new-tokens", "100000"], "100000"),
        (["chat", "hi", "--image", "cat.png"], "reads text only"),
        (["chat", "hi", "--video", "cat.mp4"], "reads text only"),
    ],
)
def test_an_error_is_one_message_and_status_2(
    place: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], shown: str
) -> None:
    assert main([*arguments[:2], *place, *arguments[2:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert shown in err
    assert "\n  -> " in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["generate"], ["generate", "hi", "--seed", "x"], ["chat", "--image"]]
)
def test_a_mistyped_command_line_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: ernie45" in capsys.readouterr().err


def test_chat_with_one_message(
    place: list[str], small_model: ErnieModel, chats: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "hello", *place, *SAMPLING, "--system", "be kind"]) == 0
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert chats == [(messages, OPTIONS)]
    assert capsys.readouterr().out == small_model.chat(messages, **OPTIONS).text + "\n"


def test_pictures_and_clips_go_with_the_first_message_in_the_order_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    real = ErnieModel.stream_chat

    def stream_chat(self: ErnieModel, messages: Any, **options: Any) -> Any:
        asked.append(list(messages))
        return real(self, [{"role": "user", "content": "in words"}], **options)  # the script's model reads text only

    monkeypatch.setattr(ErnieModel, "stream_chat", stream_chat)
    monkeypatch.setattr(ErnieModel, "preview", lambda self, messages: ["two pictures"])
    monkeypatch.setattr("ernie45.cli._load", lambda options: scripted_model(["red", "blue"]))
    type_in(monkeypatch, "What colour?", "And now?", "")
    media = ["--image", "a.png", "--video", "b.mp4", "--image", "https://example.org/c.png"]
    assert main(["chat", "--system", "be brief", *media]) == 0
    shown = capsys.readouterr()
    assert shown.out == "red\nblue\n"
    assert shown.err.count("two pictures") == 1
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "video", "video": "b.mp4"},
        {"type": "image", "image": "https://example.org/c.png"},
        {"type": "text", "text": "What colour?"},
    ]
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    assert asked[0] == first
    assert asked[1] == [*first, {"role": "assistant", "content": "red"}, {"role": "user", "content": "And now?"}]


def test_reasoning_goes_to_standard_error(
    chats: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = "12 + 30 = 42\n</think>\n\n<response>\n42\n</response>\n"
    monkeypatch.setattr("ernie45.cli._load", lambda options: scripted_model([reply, reply], thinking=True))
    type_in(monkeypatch, "What is 12 + 30?", "And again?", "")
    assert main(["chat"]) == 0
    assert tuple(capsys.readouterr()) == ("42\n42\n", "12 + 30 = 42\n\n" * 2)
    assert chats[1][0][1] == {"role": "assistant", "content": "42", "thoughts": "12 + 30 = 42"}


def test_a_reader_who_leaves_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "ernie45.cli", "models"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("end", ["", "   ", EOFError()])
def test_a_chat_keeps_its_history_until_an_empty_line(
    place: list[str],
    small_model: ErnieModel,
    chats: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str | BaseException,
) -> None:
    left = type_in(monkeypatch, "the cat", " the hat ", end, "not read")
    assert main(["chat", *place, "--temperature", "0", "--max-new-tokens", "5"]) == 0
    assert list(left) == ["not read"]
    first = [{"role": "user", "content": "the cat"}]
    answer = small_model.chat(first, temperature=0, max_new_tokens=5)
    second = [*first, answer.message, {"role": "user", "content": "the hat"}]
    assert [messages for messages, _ in chats] == [first, second]
    assert capsys.readouterr().out == (
        f"{answer.text}\n{small_model.chat(second, temperature=0, max_new_tokens=5).text}\n"
    )


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    place: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[Any]] = []
    real = ErnieModel.stream_chat

    def stream_chat(self: ErnieModel, messages: Any, **options: Any) -> Any:
        asked.append(list(messages))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return real(self, messages, **options)

    monkeypatch.setattr(ErnieModel, "stream_chat", stream_chat)
    type_in(monkeypatch, "first", "second", "")
    assert main(["chat", *place, "--max-new-tokens", "2"]) == 0
    assert asked == [[{"role": "user", "content": "first"}], [{"role": "user", "content": "second"}]]


def test_an_interrupt_at_the_prompt_ends_with_status_130(place: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, KeyboardInterrupt())
    assert main(["chat", *place]) == 130


def table_rows(out: str) -> dict[str, list[str]]:
    """The cells after the first column, by the first."""
    return {name: cells for name, *cells in (re.split(r"  +", line) for line in out.split("\n\n")[0].splitlines())}


def test_models_are_a_table_that_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    rows = table_rows(out)
    assert list(rows) == ["NAME", *(info.name for info in list_models())]
    assert rows["baidu/ERNIE-4.5-21B-A3B-PT"] == ["instruct", "21.8B", "3.4B", "40.7 GiB", "~40.9 GiB"]
    assert "PRESET" not in out


def test_models_for_a_machine_say_how_each_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--memory", "24GiB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    rows = table_rows(out)
    assert list(rows) == ["NAME", *(info.name for info in list_models())]
    plan = plan_memory("ERNIE-4.5-21B-A3B-PT", device="cpu", memory="24GiB", max_batch=1)
    assert plan.preset in ("int8", "int4")
    assert rows["baidu/ERNIE-4.5-21B-A3B-PT"] == [
        *["instruct", "21.8B", plan.preset, f"{plan.peak_bytes / 2**30:.1f} GiB", f"{plan.longest_context_tokens:,}"]
    ]
    assert rows["ernie45/tiny-dense"][2] == "none"
    streams = plan_memory("ERNIE-4.5-300B-A47B-PT", device="cpu", memory="24GiB", max_batch=1)
    assert rows["baidu/ERNIE-4.5-300B-A47B-PT"][2:] == [
        *["streams as int4", f"{streams.peak_bytes / 2**30:.1f} GiB", f"{streams.longest_context_tokens:,}"]
    ]
    assert rows["baidu/ERNIE-4.5-300B-A47B-FP8-Paddle"][2:] == ["-", "-", "-"]


def test_a_model_for_which_nothing_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--memory", "1GiB"]) == 0
    rows = table_rows(capsys.readouterr().out)
    assert (rows["baidu/ERNIE-4.5-300B-A47B-PT"][2], rows["baidu/ERNIE-4.5-300B-A47B-PT"][4]) == ("-", "-")


def test_models_for_a_machine_with_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--memory", "cuda:0=80GB", "--memory", "cpu=24GiB"]) == 0
    assert table_rows(capsys.readouterr().out)["baidu/ERNIE-4.5-21B-A3B-PT"][2] == "none"


@pytest.mark.parametrize("command", [["generate", "the cat"], ["chat", "the cat"]])
def test_how_a_model_is_loaded_can_be_chosen(
    command: list[str], place: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[ErnieModel] = []
    real = ErnieModel.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> ErnieModel:
        loaded.append(real(*arguments, **options))
        return loaded[0]

    monkeypatch.setattr(ErnieModel, "from_pretrained", from_pretrained)
    options = ["--quantization", "int8", "--kv-dtype", "int8", "--memory", "cpu=2GiB", "--context", "100"]
    assert main([*command, *place, *options, "--max-new-tokens", "2"]) == 0
    plan = loaded[0].plan
    assert (plan.preset, plan.kv_dtype, plan.context_tokens) == ("int8", "int8", 100)
    assert plan.devices[0].capacity_bytes == 2 * 2**30


@pytest.mark.parametrize("command", [["generate", "the cat"], ["chat", "the cat"]])
def test_a_model_that_does_not_fit_is_refused(
    command: list[str], place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *place, "--memory", "1MiB"]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_memory_size_that_is_none_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--memory", "much"]) == 2
    assert "'much' is not a memory size\n  -> " in capsys.readouterr().err


def test_the_page_about_models_has_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    table = capsys.readouterr().out.split("\n\n")[0]
    printed = [re.split(r"  +", line.strip()) for line in table.splitlines()[1:]]
    page = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(("| ernie45/", "| baidu/"))]
    assert rows == printed
