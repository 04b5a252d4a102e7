"""The command line of `ernie45 quality`."""

from __future__ import annotations

import argparse
from typing import Any

from ernie45.presets import PRESETS

DEFAULT_MODEL = "ernie45/tiny-dense"


def add_quality(commands: Any) -> None:
    """Add `quality` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser(
        "quality", help="what each quantisation preset costs in right answers, perplexity and logits"
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help=f"name, folder or Hub id (default: {DEFAULT_MODEL})"
    )
    parser.add_argument("--presets", default=",".join(PRESETS), help="(default: all) e.g. int8,int4")
    parser.add_argument("--kv-dtype", default="auto", help="how keys and values are kept, e.g. auto,int8")
    parser.add_argument(
        "--items", type=int, default=50, help="questions of each task of a built-in model (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which questions, and which random inputs of --layers")
    parser.add_argument("--text", metavar="FILE", help="score this text, and ask no questions")
    parser.add_argument(
        "--layers", metavar="FOLDER", help="measure single matrices of a checkpoint of any size, without loading it"
    )
    parser.add_argument("--max-layers", type=int, default=4, help="of how many layers, for --layers (default: 4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_quality)


def _quality(options: argparse.Namespace) -> int:
    # Imported here because they bring torch, which `--help` and mistyped options need not wait for.
    from ernie45.commands.matrix_quality import matrix_quality
    from ernie45.commands.quality import quality

    report = (
        quality(
            options.model,
            presets=options.presets.split(","),
            kv_dtypes=options.kv_dtype.split(","),
            num_items=options.items,
            seed=options.seed,
            text_file=options.text,
        )
        if options.layers is None
        else matrix_quality(options.layers, max_layers=options.max_layers, seed=options.seed)
    )
    print(report.json() if options.json else report)
    return 0
