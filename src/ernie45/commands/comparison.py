"""Our logits beside transformers', on one checkpoint folder."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch

from ernie45.checkpoint.open import Checkpoint
from ernie45.commands.convert import convert
from ernie45.commands.transformers_config import check_transformers_holds
from ernie45.commands.verify_report import Comparison
from ernie45.devices import free_bytes
from ernie45.errors import CheckpointError, OutOfMemoryError
from ernie45.model import ErnieModel

NUM_POSITIONS = 16
# One model at a time, and room for what opening one takes beside its weights
_MEMORY_FACTOR = 1.25
_FIXED_BYTES = 500_000_000
_STEP = 7919  # a prime, so that the ids lie all over the vocabulary


def compare_with_transformers(
    checkpoint: Checkpoint, *, num_parameters: int, num_token_ids: int, progress: bool
) -> Comparison:
    """Run both in float32 on the CPU, one after the other, on a fixed prompt of `NUM_POSITIONS` ids.

    transformers cannot read Paddle's layouts: it gets such a folder as `convert` writes it, into the system's place for
    temporary files.

    Raises:
        OutOfMemoryError: there is no room in memory for a float32 model, or on the disk for the converted folder; says
            how much it takes.
        CheckpointError: or one of its kinds: a file is damaged, or transformers cannot open the folder.
        UnsupportedError: transformers has no place for one of the tensors.
    """
    folder, is_pt = checkpoint.folder, checkpoint.layout.name == "pt"
    if is_pt:
        check_transformers_holds(checkpoint.spec, checkpoint.index.tensors)
    needed = int(4 * num_parameters * _MEMORY_FACTOR) + _FIXED_BYTES
    _check_room("memory", needed, free_bytes(torch.device("cpu")))
    if not is_pt:
        _check_room("space for temporary files", checkpoint.index.total_bytes, disk_usage(tempfile.gettempdir()).free)
    ids = [(1 + number * _STEP) % num_token_ids for number in range(NUM_POSITIONS)]
    ours = _our_logits(folder, ids, progress)
    gc.collect()
    if is_pt:
        theirs = _their_logits(folder, ids)
        through = "the folder itself"
    else:
        with tempfile.TemporaryDirectory(prefix="ernie45-verify-") as temporary:
            converted = Path(temporary) / "converted"
            convert(folder, converted, progress=progress)
            theirs = _their_logits(converted, ids)
        through = "transformers through `ernie45 convert`"
    return Comparison(
        num_positions=NUM_POSITIONS,
        max_difference=float((ours - theirs).abs().max()),
        num_equal_ids=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        through=through,
    )


def _check_room(what: str, needed: int, free: int) -> None:
    if free < needed:
        raise OutOfMemoryError(
            f"comparing in float32 takes about {needed:,} bytes of {what}, and {free:,} are free",
            hint="run it on a larger machine",
        )


def _our_logits(folder: Path, ids: list[int], progress: bool) -> torch.Tensor:
    with ErnieModel.from_pretrained(
        folder, device="cpu", dtype="float32", context_tokens=2 * NUM_POSITIONS, max_batch=1, progress=progress
    ) as model:
        return model.logits(ids)


def _their_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    # Imported here because it takes a while, and most of a report does without.
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever it raises, the report is to say so
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"transformers cannot open it: {reason}", hint="`ernie45 convert` writes a folder that it opens"
        ) from error
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits
