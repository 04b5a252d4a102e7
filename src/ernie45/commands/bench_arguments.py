"""The command line of `ernie45 bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ernie45.errors import InvalidRequestError

DEFAULT_MODEL = "ernie45/tiny-dense"


def add_bench(commands: Any) -> None:
    """Add `bench` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser("bench", help="how fast a model runs on this machine, and what it takes in memory")
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"name, folder or Hub id (default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--quantization", default="auto", metavar="PRESETS", help="with commas to compare, e.g. none,int8,int4"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of each prompt (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each reply (default: 64)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="requests at a time (default: 8)")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the numbers, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    # Imported here because it brings torch, which `--help` and mistyped options need not wait for.
    from ernie45.commands.bench import bench

    report = bench(
        options.model,
        presets=[name.strip() for name in options.quantization.split(",")],
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch=options.batch,
        num_repetitions=options.repetitions,
        report_progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(report.json() if options.json else report)
    if options.plot is not None:
        try:
            options.plot.write_text(report.svg(), encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"{options.plot} cannot be written: {error}", hint="name another file") from error
    return 0
