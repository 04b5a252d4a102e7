"""The command lines of `ernie45 convert` and `ernie45 verify`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ernie45.memory.budget import parse_bytes

# Both commands import torch, which `--help` and mistyped options need not wait for.


def add_convert(commands: Any) -> None:
    """Add `convert` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint, Paddle's or -PT, as a clean -PT folder, or packed",
        description="Write a checkpoint, Paddle's or -PT, as a clean -PT folder, or packed in 8 or 4 bits. Cut off at "
        "any point and run again, the command goes on; on a finished folder it changes nothing.",
    )
    parser.add_argument("source", metavar="SRC", help="name, folder or Hub id")
    parser.add_argument("destination", metavar="DST", help="a new folder, or one that an earlier run left unfinished")
    parser.add_argument(
        "--quantization", default="none", metavar="PRESET", help="int8 or int4 writes the packed format (default: none)"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file, e.g. 2GB (default: 5GB)")
    parser.set_defaults(run=_convert)


def add_verify(commands: Any) -> None:
    """Add `verify` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser(
        "verify", help="account for every tensor of a checkpoint and compare with transformers; prints Markdown"
    )
    parser.add_argument("folder", metavar="FOLDER", help="name, folder or Hub id")
    parser.add_argument("--no-compare", action="store_true", help="read the headers alone, run no model")
    parser.set_defaults(run=_verify)


def _convert(options: argparse.Namespace) -> int:
    from ernie45.checkpoint.write import DEFAULT_SHARD_BYTES
    from ernie45.commands.convert import convert

    size = options.max_shard_size
    shard_bytes = DEFAULT_SHARD_BYTES if size is None else parse_bytes(size)
    try:
        report = convert(
            options.source, options.destination, quantization=options.quantization, max_shard_bytes=shard_bytes
        )
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again, and it goes on", file=sys.stderr)
        raise
    print(report)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ernie45.commands.verify import verify

    report = verify(options.folder, compare=not options.no_compare)
    print(report)
    return 0 if report.is_good else 1
