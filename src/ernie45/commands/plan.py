"""The command line of `ernie45 plan`, and the options about memory that other commands share with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ernie45.errors import InvalidRequestError


def add_plan(commands: Any) -> None:
    """Add `plan` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser("plan", help="what a model takes in memory, and whether it fits; loads nothing")
    parser.add_argument("model", metavar="MODEL", help="a name that `ernie45 models` lists, or a folder")
    add_memory_options(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="requests at a time (default: 32 or what fits)")
    parser.add_argument(
        "--draft", metavar="DRAFT", help="what guesses tokens: lookup, mtp, or a model's name or folder"
    )
    parser.add_argument(
        "--routing", metavar="FILE.npz", help="a routing trace of the model: how often a token finds experts in memory"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides where and how a model is loaded."""
    parser.add_argument(
        "--quantization", default="auto", metavar="PRESET", help="auto, none, int8, int4, nf4 or bnb-int8"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add_memory_limit(parser, "what may be used (default: what is free)")
    parser.add_argument("--context", type=int, metavar="N", help="prompt and reply in tokens (default: 8192)")
    parser.add_argument("--kv-dtype", default="auto", help="of the KV cache: auto or int8")


def add_memory_limit(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--memory`, which `memory_limit` reads."""
    parser.add_argument(
        "--memory",
        action="append",
        metavar="SIZE",
        help=f"{help}, e.g. 24GiB; or, repeated, cuda:0=20GiB, cpu=24GiB, disk=50GB",
    )


def memory_limit(sizes: Sequence[str] | None) -> dict[str, str] | None:
    """What `--memory` says; a size without a device's name is the CPU's.

    Raises:
        InvalidRequestError: a device named twice.
    """
    if sizes is None:
        return None
    limit: dict[str, str] = {}
    for text in sizes:
        name, _, size = text.rpartition("=")
        name = name or "cpu"
        if name in limit:
            raise InvalidRequestError(f"--memory names {name!r} twice", hint="give one size to each device")
        limit[name] = size
    return limit


def _plan(options: argparse.Namespace) -> int:
    from ernie45.planning import plan_memory

    routing = None
    if options.routing is not None:
        from ernie45.experts.trace import RoutingTrace  # here, because numpy takes a while

        routing = RoutingTrace.load(options.routing)
    plan = plan_memory(
        options.model,
        quantization=options.quantization,
        device=options.device,
        dtype=options.dtype,
        memory=memory_limit(options.memory),
        context_tokens=options.context,
        max_batch=options.batch,
        kv_dtype=options.kv_dtype,
        draft=options.draft,
        routing=routing,
    )
    print(plan.to_json() if options.json else plan)
    return 0
