"""The `ernie45` command: `generate` completes a text, `chat` talks, `models` lists what is known by name, `plan` says
what a model takes in memory, `convert` and `verify` work on checkpoint folders, `doctor` says what this machine has.

Replies are streamed to standard output, reasoning to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ernie45.commands.arguments import add_convert, add_verify
from ernie45.commands.bench_arguments import add_bench
from ernie45.commands.plan import add_memory_limit, add_memory_options, add_plan, memory_limit
from ernie45.commands.quality_arguments import add_quality
from ernie45.errors import ErnieError, UnsupportedError

if TYPE_CHECKING:
    from ernie45.catalogue import ModelInfo
    from ernie45.model import ErnieModel
    from ernie45.types.messages import Message
    from ernie45.types.requests import SamplingOptions
    from ernie45.types.results import ChatChunk, CompletionChunk, Usage

DEFAULT_MODEL = "ernie45/tiny-dense"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for problems that `verify` found, 2 for an error of ours, 130
    when interrupted, 141 when nobody reads the output any more."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except ErnieError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ernie45", description="Run ERNIE 4.5 models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="complete a text")
    generate.add_argument("prompt", help="the text to go on from; - reads standard input")
    chat = commands.add_parser("chat", help="talk to a model; an empty line or Ctrl-D ends")
    chat.add_argument("message", nargs="?", help="ask this one thing and stop")
    chat.add_argument("--system", help="instructions to start the conversation with")
    chat.add_argument(
        "--image",
        action="append",
        dest="media",
        type=_image,
        metavar="FILE_OR_URL",
        help="a picture to ask about, put before the first message; may be repeated",
    )
    chat.add_argument(
        "--video", action="append", dest="media", type=_video, metavar="FILE_OR_URL", help="the same for a clip"
    )
    chat.add_argument("--max-pixels", type=int, metavar="N", help="most pixels of a picture (default: see the guide)")
    generate.set_defaults(run=_generate, max_pixels=None)
    chat.set_defaults(run=_chat)

    for command in (generate, chat):
        command.add_argument(
            "--model", default=DEFAULT_MODEL, help=f"name, folder or Hub id (default: {DEFAULT_MODEL})"
        )
        add_memory_options(command)
        command.add_argument("--max-new-tokens", type=int, help="longest reply in tokens (default: 512)")
        command.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
        command.add_argument("--top-p", type=float, help="(default: the checkpoint's)")
        command.add_argument("--seed", type=int, help="the same seed gives the same text")
        command.add_argument("--usage", action="store_true", help="print token counts and speed to standard error")

    models = commands.add_parser("models", help="list the models known by name, with their sizes")
    add_memory_limit(models, "say which models run in this much memory, and how")
    models.set_defaults(run=_models)

    add_plan(commands)
    add_convert(commands)
    add_verify(commands)
    add_quality(commands)
    add_bench(commands)

    doctor = commands.add_parser("doctor", help="what this installation and this machine have, and what is missing")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _generate(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    with _load(options) as model, model.stream_generate(prompt, **_sampling(options)) as chunks:
        _show(chunks, options.usage)
    return 0


def _chat(options: argparse.Namespace) -> int:
    history: list[Message] = []
    if options.system is not None:
        history.append({"role": "system", "content": options.system})
    with _load(options) as model:
        if options.message is not None:
            _answer(model, history, options.message, options)
            return 0
        while message := _ask():
            try:
                _answer(model, history, message, options)
            except KeyboardInterrupt:  # ends the answer, which then is no part of the history, not the conversation
                print()
    return 0


def _image(source: str) -> dict[str, Any]:
    return {"type": "image", "image": source}


def _video(source: str) -> dict[str, Any]:
    return {"type": "video", "video": source}


def _answer(model: ErnieModel, history: list[Message], message: str, options: argparse.Namespace) -> None:
    """Stream one answer and add the turn to `history`. The first one has the pictures and clips."""
    turn: Message = {"role": "user", "content": message}
    if options.media and not any(earlier["role"] == "user" for earlier in history):
        turn["content"] = [*options.media, {"type": "text", "text": message}]
        for preview in model.preview([turn]):
            print(preview, file=sys.stderr)
    thoughts: list[str] = []
    with model.stream_chat([*history, turn], **_sampling(options)) as chunks:
        text = _show(_show_reasoning(chunks, thoughts), options.usage)
    answer: Message = {"role": "assistant", "content": text}
    if thoughts:
        answer["thoughts"] = "".join(thoughts)
    history += [turn, answer]


def _show_reasoning(chunks: Iterable[ChatChunk], thoughts: list[str]) -> Iterator[ChatChunk]:
    """Print what a model thinks to standard error, add it to `thoughts`, and pass the chunks on."""
    is_thinking = False
    for chunk in chunks:
        if chunk.reasoning:
            is_thinking = True
            thoughts.append(chunk.reasoning)
            print(chunk.reasoning, end="", file=sys.stderr, flush=True)
        elif is_thinking and (chunk.text or chunk.finish_reason is not None):
            is_thinking = False
            print("\n", file=sys.stderr)
        yield chunk


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _load(options: argparse.Namespace) -> ErnieModel:
    # Imported here because it brings torch, which `--help` and mistyped options need not wait for.
    from ernie45.model import ErnieModel

    return ErnieModel.from_pretrained(
        options.model,
        quantization=options.quantization,
        device=options.device,
        dtype=options.dtype,
        memory=memory_limit(options.memory),
        context_tokens=options.context,
        kv_dtype=options.kv_dtype,
        max_pixels=options.max_pixels,
    )


def _sampling(options: argparse.Namespace) -> SamplingOptions:
    sampling: SamplingOptions = {}
    if options.max_new_tokens is not None:
        sampling["max_new_tokens"] = options.max_new_tokens
    if options.temperature is not None:
        sampling["temperature"] = options.temperature
    if options.top_p is not None:
        sampling["top_p"] = options.top_p
    if options.seed is not None:
        sampling["seed"] = options.seed
    return sampling


def _show(chunks: Iterable[CompletionChunk] | Iterable[ChatChunk], with_usage: bool) -> str:
    texts = []
    usage: Usage | None = None
    for chunk in chunks:
        print(chunk.text, end="", flush=True)
        texts.append(chunk.text)
        usage = chunk.usage or usage
    print()
    if with_usage and usage is not None:
        print(describe_usage(usage), file=sys.stderr)
    return "".join(texts)


def describe_usage(usage: Usage) -> str:
    """One line for people: token counts, time to the first token, speed."""
    parts = [f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} new"]
    if usage.seconds_to_first_token is not None:
        parts.append(f"first after {usage.seconds_to_first_token:.2f} s")
    if usage.tokens_per_second is not None:
        parts.append(f"{usage.tokens_per_second:.0f} tokens/s")
    return ", ".join(parts)


def _models(options: argparse.Namespace) -> int:
    from ernie45.catalogue import list_models

    models = list_models()
    limit = memory_limit(options.memory)
    if limit is None:
        _print_table([["NAME", "KIND", "PARAMS", "ACTIVE", "WEIGHTS", "ON DISK"], *map(_describe_model, models)])
        print("\nWEIGHTS are unquantised (bfloat16), as loaded. ~ is estimated. VL models also see images and video.")
        return 0
    rows = [_fit_model(info, limit) for info in models]
    _print_table([["NAME", "KIND", "PARAMS", "PRESET", "PEAK", "CONTEXT"], *rows])
    print(
        "\nPRESET: the best quality that fits with one request of 8,192 tokens, or the model's maximum.",
        "PEAK: the memory that takes. CONTEXT: the most tokens that fit with that preset.",
        "What streams reads its experts from disk as they are needed; `ernie45 plan NAME` says how fast.",
        "- does neither, or is a quantised release that is not read.",
        sep="\n",
    )
    return 0


def _describe_model(info: ModelInfo) -> list[str]:
    weights, disk = _bytes_in_words(info.weight_bytes), _bytes_in_words(info.disk_bytes)
    return [
        *[info.name, info.kind, _count_in_words(info.total_params), _count_in_words(info.active_params)],
        *[weights, f"~{disk}" if info.disk_bytes_approximate else disk],
    ]


def _fit_model(info: ModelInfo, limit: dict[str, str]) -> list[str]:
    from ernie45.checkpoint.quantized_releases import refuse_by_name
    from ernie45.planning import plan_memory

    row = [info.name, info.kind, _count_in_words(info.total_params)]
    try:
        refuse_by_name(info.name)
    except UnsupportedError:
        return [*row, "-", "-", "-"]
    on_cpu = all(name.startswith(("cpu", "disk")) for name in limit)
    plan = plan_memory(info.name, device="cpu" if on_cpu else "auto", memory=limit, max_batch=1)
    peak = _bytes_in_words(plan.peak_bytes)
    if plan.verdict == "does not fit":
        return [*row, "-", peak, "-"]
    preset = plan.preset if plan.verdict == "fits" else f"streams as {plan.preset}"
    return [*row, preset, peak, f"{plan.longest_context_tokens:,}"]


def _doctor(options: argparse.Namespace) -> int:
    from ernie45.commands.doctor import diagnose

    diagnosis = diagnose()
    print(diagnosis.to_json() if options.json else diagnosis)
    return 0


def _print_table(table: Sequence[Sequence[str]]) -> None:
    """Columns two spaces apart, the first two to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right))


def _count_in_words(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 10**9 else f"{count / 1e6:.1f}M"


def _bytes_in_words(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
