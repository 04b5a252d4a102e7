"""Our logits beside transformers', on one checkpoint folder."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch

from ernie45.checkpoint.open import Checkpoint, read_config
from ernie45.commands.compared_prompts import picture_prompt, text_prompt, transformers_inputs
from ernie45.commands.conversion_plan import config_of
from ernie45.commands.convert import convert
from ernie45.commands.media_tokens import media_token_ids
from ernie45.commands.transformers_config import VISION_MODEL_TYPE, check_transformers_holds
from ernie45.commands.verify_report import Comparison
from ernie45.devices import free_bytes
from ernie45.errors import CheckpointError, OutOfMemoryError
from ernie45.model import ErnieModel
from ernie45.types.prompts import Prompt

CONTEXT_TOKENS = 64
# One model at a time, and room for what opening one takes beside its weights
_MEMORY_FACTOR = 1.25
_FIXED_BYTES = 500_000_000


def compare_with_transformers(
    checkpoint: Checkpoint, *, num_parameters: int, num_token_ids: int, progress: bool
) -> tuple[Comparison, ...]:
    """Run both in float32 on the CPU, one after the other, on a fixed text, and with one picture where the model sees.

    transformers cannot read Paddle's layouts: it gets such a folder as `convert` writes it, into the system's place for
    temporary files. The published config of a vision-language model it gets as `convert` writes it.

    Raises:
        OutOfMemoryError: there is no room in memory for a float32 model, or on the disk for the converted folder; says
            how much it takes.
        CheckpointError: or one of its kinds: a file is damaged, or transformers cannot open the folder.
        UnsupportedError: transformers has no place for one of the tensors.
    """
    folder, is_pt, spec = checkpoint.folder, checkpoint.layout.name == "pt", checkpoint.spec
    if is_pt:
        check_transformers_holds(spec, checkpoint.index.tensors)
    needed = int(4 * num_parameters * _MEMORY_FACTOR) + _FIXED_BYTES
    _check_room("memory", needed, free_bytes(torch.device("cpu")))
    if not is_pt:
        _check_room("space for temporary files", checkpoint.index.total_bytes, disk_usage(tempfile.gettempdir()).free)
    config = read_config(folder)
    prompts = [text_prompt(num_token_ids)]
    if spec.vision is not None:
        prompts.append(picture_prompt(spec.vision, num_token_ids, media_token_ids(folder, config)))
    ours = _our_logits(folder, prompts, progress)
    gc.collect()
    if not is_pt:
        with tempfile.TemporaryDirectory(prefix="ernie45-verify-") as temporary:
            converted = Path(temporary) / "converted"
            convert(folder, converted, progress=progress)
            theirs = _their_logits(converted, prompts)
        through = "transformers through `ernie45 convert`"
    elif spec.vision is not None and config.get("model_type") != VISION_MODEL_TYPE:
        written = config_of(checkpoint, config, tied="lm_head.weight" not in checkpoint.index.tensors)
        theirs = _their_logits(folder, prompts, written)
        through = "the folder itself, its config as `ernie45 convert` writes it"
    else:
        theirs = _their_logits(folder, prompts)
        through = "the folder itself"
    return tuple(
        Comparison(
            of="a picture" if prompt.media else "text",
            num_positions=len(prompt),
            max_difference=float((our - their).abs().max()),
            num_equal_ids=int((our.argmax(-1) == their.argmax(-1)).sum()),
            through=through,
        )
        for prompt, our, their in zip(prompts, ours, theirs, strict=True)
    )


def _check_room(what: str, needed: int, free: int) -> None:
    if free < needed:
        raise OutOfMemoryError(
            f"comparing in float32 takes about {needed:,} bytes of {what}, and {free:,} are free",
            hint="run it on a larger machine",
        )


def _our_logits(folder: Path, prompts: Sequence[Prompt], progress: bool) -> list[torch.Tensor]:
    with ErnieModel.from_pretrained(
        folder, device="cpu", dtype="float32", context_tokens=CONTEXT_TOKENS, max_batch=1, progress=progress
    ) as model:
        return [model.logits(prompt) for prompt in prompts]


def _their_logits(folder: Path, prompts: Sequence[Prompt], config: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """`config` stands for the folder's config.json, where transformers does not know what that says."""
    # Imported here because it takes a while, and most of a report does without.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    of_pictures = any(prompt.media for prompt in prompts)
    opener: Any = AutoModelForImageTextToText if of_pictures else AutoModelForCausalLM
    known = {} if config is None else {"config": AutoConfig.for_model(**config)}
    try:
        model: Any = opener.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, **known
        )
    except Exception as error:  # whatever it raises, the report is to say so
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"transformers cannot open it: {reason}", hint="`ernie45 convert` writes a folder that it opens"
        ) from error
    model.eval()
    with torch.inference_mode():
        return [model(**transformers_inputs(prompt)).logits[0] for prompt in prompts]
