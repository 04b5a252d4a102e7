"""Compare ernie45 and transformers on a photo: cutting it into patches, and the time to the first token.

python -m benchmarks.pictures FOLDER [--what prepare|first-token|all] [--pixels 501760] [--repetitions 5]

FOLDER holds a vision-language checkpoint that transformers opens, in bf16; make_checkpoint writes one. Both sides get
the same photo, 1920 x 1080, and the same limit of pixels; transformers cuts it with its Pillow processor and attends
with sdpa. Memory is what a side's process grew to above its state after loading.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from benchmarks.report import describe_machine
from benchmarks.sides import EAGER, OURS
from ernie45.types.media import Media, PlacedMedia
from ernie45.types.prompts import Prompt

PHOTO_SIZE = (1920, 1080)
KINDS = ("prepare", "first-token")
NUM_WARMUPS = 1
START_ID, PLACEHOLDER_ID, END_ID = 101304, 100295, 101305
TEXT_IDS = tuple(range(1000, 1020))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One run: seconds, and bytes that the process grew by beyond its state after loading."""

    seconds: float
    grown_bytes: int


class PictureSide(Protocol):
    """One contender, loaded in bf16 on the CPU with a thread for each core."""

    def prepare(self, photo: Image.Image) -> object:
        """Cut the photo into patches."""
        ...

    def first_token(self, photo: Image.Image) -> None:
        """Cut it, encode it, and draw one token after a prompt that holds it."""
        ...


class ErniePictures:
    """ernie45 by the calls that `chat` makes; a folder of random weights has no tokenizer for `chat` itself."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        from ernie45 import ErnieModel

        self._model = ErnieModel.from_pretrained(
            folder, device="cpu", dtype="bfloat16", context_tokens=8192, max_batch=1, progress=False
        )
        self._max_pixels = max_pixels

    def prepare(self, photo: Image.Image) -> Media:
        from ernie45.types.limits import MediaLimits
        from ernie45.vision import VisionSettings, open_image, prepare_image

        return prepare_image(open_image(photo, limits=MediaLimits()), VisionSettings(), max_pixels=self._max_pixels)

    def first_token(self, photo: Image.Image) -> None:
        media = self.prepare(photo)
        ids = (*TEXT_IDS, START_ID, *([PLACEHOLDER_ID] * media.num_tokens), END_ID, *TEXT_IDS)
        prompt = Prompt(text="", token_ids=ids, media=(PlacedMedia(first=len(TEXT_IDS) + 1, media=media),))
        self._model.generate(prompt, max_new_tokens=1, temperature=0, ignore_eos=True)


class TransformersPictures:
    """transformers' Pillow processor and `generate`."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        from transformers import Ernie4_5_VLMoeForConditionalGeneration
        from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
            Ernie4_5_VLMoeImageProcessorPil,
        )

        model: Any = Ernie4_5_VLMoeForConditionalGeneration
        self._model = model.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        self._processor: Any = Ernie4_5_VLMoeImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": max_pixels}
        )

    def prepare(self, photo: Image.Image) -> Any:
        return self._processor(photo, return_tensors="pt")

    def first_token(self, photo: Image.Image) -> None:
        prepared = self.prepare(photo)
        num_tokens = int(prepared["image_grid_thw"].prod()) // 4
        ids = torch.tensor([[*TEXT_IDS, START_ID, *([PLACEHOLDER_ID] * num_tokens), END_ID, *TEXT_IDS]])
        with torch.no_grad():
            self._model.generate(
                input_ids=ids,
                pixel_values=prepared["pixel_values"],
                image_grid_thw=prepared["image_grid_thw"],
                mm_token_type_ids=(ids == PLACEHOLDER_ID).int(),
                moe_mm_token_type_ids=((ids == PLACEHOLDER_ID) | (ids == START_ID) | (ids == END_ID)).int(),
                max_new_tokens=1,
                do_sample=False,
                use_cache=True,
            )


def make_photo(seed: int) -> Image.Image:
    """A picture as smooth as a photo, another for each seed: nobody's cache knows it."""
    small = np.random.default_rng(seed).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(PHOTO_SIZE, Image.Resampling.BICUBIC)


def compare_pictures(
    folder: Path, kinds: Sequence[str], *, max_pixels: int, num_repetitions: int
) -> dict[str, dict[str, list[Measured]]]:
    """Measure each kind on both sides, alternating, `num_repetitions` times -> kind, side, runs."""
    measured: dict[str, dict[str, list[Measured]]] = {kind: {OURS: [], EAGER: []} for kind in kinds}
    with ExitStack() as stack:
        connections = {name: _start(stack, name, folder, max_pixels) for name in (OURS, EAGER)}
        for repetition in range(-NUM_WARMUPS, num_repetitions):
            for kind in kinds:
                for name in (OURS, EAGER) if repetition % 2 else (EAGER, OURS):
                    connections[name].send((kind, repetition))
                    run: Measured = connections[name].recv()
                    print(f"{repetition}: {kind}, {name}: {run.seconds:.3f} s", file=sys.stderr, flush=True)
                    if repetition >= 0:
                        measured[kind][name].append(run)
    return measured


def _start(stack: ExitStack, name: str, folder: Path, max_pixels: int) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, name, folder, max_pixels), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.terminate)
    ours.recv()
    return ours


def _serve(connection: Connection, name: str, folder: Path, max_pixels: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    side: PictureSide = (ErniePictures if name == OURS else TransformersPictures)(folder, max_pixels)
    loaded_bytes = _status("VmRSS")
    connection.send("loaded")
    while True:
        try:
            kind, seed = connection.recv()
        except EOFError:
            return
        photo = make_photo(seed + NUM_WARMUPS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.perf_counter()
        if kind == "prepare":
            side.prepare(photo)
        else:
            side.first_token(photo)
        seconds = time.perf_counter() - started
        connection.send(Measured(seconds=seconds, grown_bytes=_status("VmHWM") - loaded_bytes))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def as_rows(measured: Mapping[str, Mapping[str, Sequence[Measured]]]) -> dict[str, dict[str, float]]:
    """Medians, the median of how many times as fast ours was within a repetition, and the peaks in MiB."""
    rows = {}
    for kind, sides in measured.items():
        ratios = [t.seconds / o.seconds for o, t in zip(sides[OURS], sides[EAGER], strict=True)]
        rows[kind] = {
            "seconds": statistics.median(run.seconds for run in sides[OURS]),
            "seconds_transformers": statistics.median(run.seconds for run in sides[EAGER]),
            "times_as_fast": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "peak_mib": max(run.grown_bytes for run in sides[OURS]) / 2**20,
            "peak_mib_transformers": max(run.grown_bytes for run in sides[EAGER]) / 2**20,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a vision-language checkpoint in the -PT layout")
    parser.add_argument("--what", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--pixels", type=int, default=640 * 28 * 28, help="most pixels that the photo is resized to")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    kinds = list(KINDS) if options.what == "all" else [options.what]
    rows = as_rows(
        compare_pictures(options.folder, kinds, max_pixels=options.pixels, num_repetitions=options.repetitions)
    )
    for kind, row in rows.items():
        print(kind, ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": machine, "pixels": options.pixels, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
