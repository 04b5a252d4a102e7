"""The command line of `ernie45 quality`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

DEFAULT_MODEL = "ernie45/tiny-dense"
DEFAULT_MAX_LAYERS = 4

# Parameters of `quality`, and what they are called here.
_OF_A_MODEL = {
    "model": "MODEL",
    "presets": "--presets",
    "kv_dtypes": "--kv-dtype",
    "num_items": "--items",
    "text_file": "--text",
}


def add_quality(commands: Any) -> None:
    """Add `quality` to the subparsers of the `ernie45` command."""
    parser = commands.add_parser(
        "quality", help="what each quantisation preset costs in right answers, perplexity and logits"
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"name, folder or Hub id (default: {DEFAULT_MODEL})")
    parser.add_argument("--presets", type=_names, help="(default: all) e.g. int8,int4")
    parser.add_argument(
        "--kv-dtype", dest="kv_dtypes", type=_names, help="how keys and values are kept, e.g. auto,int8 (default: auto)"
    )
    parser.add_argument(
        "--items", dest="num_items", type=int, help="questions of each task of a built-in model (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which questions, and which random inputs of --layers")
    parser.add_argument("--text", dest="text_file", metavar="FILE", help="score this text, and ask no questions")
    parser.add_argument(
        "--layers", metavar="FOLDER", help="measure single matrices of a checkpoint of any size, without loading it"
    )
    parser.add_argument(
        "--max-layers", type=int, help=f"of how many layers, for --layers (default: {DEFAULT_MAX_LAYERS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=partial(_quality, parser))


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"a name is missing in {text!r}")
    return names


def _quality(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    given = {name: value for name in _OF_A_MODEL if (value := getattr(options, name)) is not None}
    if options.layers is not None and given:
        parser.error(f"argument --layers: not allowed with argument {_OF_A_MODEL[next(iter(given))]}")
    if options.layers is None and options.max_layers is not None:
        parser.error("argument --max-layers: needs argument --layers")
    # Imported here because they bring torch, which `--help` and mistyped options need not wait for.
    from ernie45.commands.matrix_quality import matrix_quality
    from ernie45.commands.quality import quality

    report = (
        quality(**{"model": DEFAULT_MODEL, "seed": options.seed, **given})
        if options.layers is None
        else matrix_quality(
            options.layers,
            max_layers=DEFAULT_MAX_LAYERS if options.max_layers is None else options.max_layers,
            seed=options.seed,
        )
    )
    print(report.json() if options.json else report)
    return 0
