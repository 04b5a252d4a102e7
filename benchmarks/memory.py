"""Planned memory against measured: each cell of a grid is loaded and used up in a process of its own. Linux only.

python -m benchmarks.memory --text FOLDER --experts FOLDER --vision ernie45/tiny-vl [--presets int4] [--contexts 512]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

NEW_TOKENS = 8
PRESETS = ("none", "int8", "int4")
TEXT_GRID = [(context, batch) for context in (512, 8192) for batch in (1, 4, 16)] + [(32768, 1)]
EXPERTS_GRID = [(2048, 1)]
PICTURE_GRID = [(2048, 1)]
MOST_OFF = 0.05  # of what was measured, by which a plan may be wrong
TINY_BYTES = 64 * 2**20  # a model below this may be wrong by as much: runs of it differ by more than a share of it
MOST_PEAK = 1.3  # times the weights, of one short request in bf16
_PICTURE_SIZE = (1024, 784)  # as many pixels as go on a CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What is loaded, and used up: `max_batch` prompts that with their replies are `context_tokens` long; or, with
    `picture`, one about a picture."""

    model: str
    preset: str
    context_tokens: int
    max_batch: int
    picture: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes: `peak` is anonymous memory and touched file pages at their highest, above the state after imports."""

    peak: int
    planned: int
    planned_parts: dict[str, int]
    weights: int


def problems(cell: Cell, measured: Measured) -> list[str]:
    """What is wrong with a cell, in a few words each."""
    found = []
    off = measured.planned - measured.peak
    if abs(off) > (TINY_BYTES if measured.weights < TINY_BYTES else MOST_OFF * measured.peak):
        found.append(f"planned {abs(off) / 1e6:,.0f} MB too {'much' if off > 0 else 'little'}")
    is_short = (cell.preset, cell.context_tokens, cell.max_batch) == ("none", *TEXT_GRID[0]) and not cell.picture
    if is_short and measured.weights >= TINY_BYTES and measured.peak > MOST_PEAK * measured.weights:
        found.append(f"peak {measured.peak / measured.weights:.2f} x the weights")
    return found


def measure(cell: Cell) -> Measured:
    """Load and use a model in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--cell", json.dumps(asdict(cell))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(cell: Cell) -> Measured:
    import random

    from PIL import Image

    from ernie45 import ErnieModel

    # The highest so far, for the system may have taken pages of libraries back; from then on it counts anew.
    before = _status_bytes("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")
    with ErnieModel.from_pretrained(
        cell.model,
        quantization=cell.preset,
        device="cpu",
        context_tokens=cell.context_tokens,
        max_batch=cell.max_batch,
        progress=False,
    ) as model:
        draw = random.Random(0)
        if cell.picture:
            picture = Image.frombytes("RGB", _PICTURE_SIZE, draw.randbytes(3 * _PICTURE_SIZE[0] * _PICTURE_SIZE[1]))
            content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
            model.chat([{"role": "user", "content": content}], max_new_tokens=NEW_TOKENS, ignore_eos=True)
        else:
            length = cell.context_tokens - NEW_TOKENS
            # Below 100,000 there are no special tokens.
            prompts = [draw.choices(range(100, 90_000), k=length) for _ in range(cell.max_batch)]
            model.batch_generate(prompts, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        peak = _status_bytes("VmHWM") - before
        plan = model.plan  # asking for it measures this machine's memory, with a buffer of its own
        return Measured(
            peak=peak,
            planned=plan.peak_bytes,
            planned_parts={**plan.parts, "loading": plan.loading_bytes},
            weights=plan.weight_bytes,
        )


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    others = [(context, 1) for context in options.contexts or () if context not in dict(TEXT_GRID)]
    text_grid = [*TEXT_GRID, *others]
    for model, grid in ((options.text, text_grid), (options.experts, EXPERTS_GRID), (options.vision, PICTURE_GRID)):
        for preset in options.presets:
            for context, batch in grid:
                wanted = context in (options.contexts or [context]) and batch in (options.batches or [batch])
                if model is not None and wanted:
                    yield Cell(
                        model=model,
                        preset=preset,
                        context_tokens=context,
                        max_batch=batch,
                        picture=grid is PICTURE_GRID,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FOLDER", help="a text model, such as the shape of ERNIE-4.5-0.3B-PT")
    parser.add_argument("--experts", metavar="FOLDER", help="a model with experts, such as four layers of 21B-A3B")
    parser.add_argument("--vision", metavar="MODEL", help="a model that sees, such as ernie45/tiny-vl")
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--contexts", nargs="+", type=int, help="only these; one request each where not of the grid")
    parser.add_argument("--batches", nargs="+", type=int, help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(asdict(_measure_here(Cell(**json.loads(options.cell))))))
        return
    print(f"{'model':24}{'preset':8}{'context':>8}{'batch':>6}{'planned':>10}{'measured':>10}{'ratio':>7}  MB")
    results = []
    is_right = True
    for cell in _cells(options):
        measured = measure(cell)
        found = problems(cell, measured)
        is_right = is_right and not found
        results.append({**asdict(cell), **asdict(measured), "problems": found})
        megabytes = (
            f"{measured.planned / 1e6:10,.0f}{measured.peak / 1e6:10,.0f}{measured.planned / measured.peak:7.3f}"
        )
        name = Path(cell.model).name[:22]
        marks = "".join(f"  ! {problem}" for problem in found)
        print(f"{name:24}{cell.preset:8}{cell.context_tokens:8}{cell.max_batch:6}{megabytes}{marks}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))
    if not is_right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
