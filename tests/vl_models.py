"""Small vision-language checkpoints of random weights, prompts for them, and transformers' own answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie45.backends import decoder
from ernie45.kernels.ops import route
from ernie45.types.media import Media, PlacedMedia
from ernie45.types.prompts import Prompt

VOCAB_SIZE = 384
NUM_TOKEN_IDS = 362  # with the two tokens of turns, which come last
# Beyond the sentencepiece model of the fixture `tokenizer_folder`.
IDS = {
    "<|IMAGE_PLACEHOLDER|>": 350,
    "<|IMAGE_START|>": 354,
    "<|IMAGE_END|>": 355,
    "<|VIDEO_START|>": 356,
    "<|VIDEO_END|>": 357,
    "<|VIDEO_PLACEHOLDER|>": 359,
}
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def random_reference(
    *, seed: int = 0, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **top: Any
) -> Any:
    """transformers' model of random weights; the entries override those of its config's parts."""
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text_config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": [20, 12],
        "moe_k": 3,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 2048,
        # A small theta: with the published one time, which has the slowest frequencies, hardly shows so soon.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 4]},
    }
    vision_config = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 64}
    config = Ernie4_5_VLMoeConfig(
        text_config={**text_config, **(text or {})},
        vision_config={**vision_config, **(vision or {})},
        **{**_config_ids(IDS), **top},
    )
    config._attn_implementation = "eager"
    config.text_config._experts_implementation = "eager"  # the faster one wants widths that are multiples of 4
    torch.manual_seed(seed)
    reference: Any = Ernie4_5_VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Biases, norms, the routers and their corrections start constant, which would hide a mistake.
        for name, parameter in reference.named_parameters():
            spread = 0.6 if name.endswith("gate.weight") else 0.3 if "e_score" in name else 0.12
            parameter.add_(torch.randn_like(parameter) * spread)
    return reference


def save_reference(reference: Any, folder: Path, tokenizer_folder: Path) -> Path:
    """A checkpoint in transformers' own form, with a tokenizer and limits that make clips small."""
    reference.save_pretrained(folder)
    add_text_side(folder, tokenizer_folder)
    return folder


def add_text_side(folder: Path, tokenizer_folder: Path, ids: Mapping[str, int] = IDS) -> None:
    """Tokenizer files that give the media's tokens these ids, and a processor's config with small limits."""
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    config["additional_special_tokens"] = list(ids)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    limits = {"min_pixels": 28 * 28, "max_pixels": 100 * 28 * 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    limits["max_pixels"] = 8 * 28 * 28
    (folder / "video_preprocessor_config.json").write_text(json.dumps(limits))


def _config_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {
        f"{kind}_{what}token_id": ids[f"<|{kind.upper()}_{name}|>"]
        for kind in ("image", "video")
        for what, name in (("", "PLACEHOLDER"), ("start_", "START"), ("end_", "END"))
    }


def picture(rows: int, columns: int, seed: int = 0) -> Media:
    """A picture of random patches."""
    return _random_media("image", (1, rows, columns), seed)


def clip(num_frames: int, rows: int, columns: int, seed: int = 0) -> Media:
    """A clip of random patches; `num_frames` is even."""
    return _random_media("video", (num_frames, rows, columns), seed)


def _random_media(kind: Any, grid: tuple[int, int, int], seed: int) -> Media:
    frames, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    # A colour for each patch and noise upon it: noise alone would look the same everywhere.
    colours = torch.randint(0, 200, (frames * rows * columns, 3, 1), generator=generator)
    patches = colours + torch.randint(0, 56, (frames * rows * columns, 3, 196), generator=generator)
    return Media(
        kind=kind,
        patches=patches.to(torch.uint8).flatten(1),
        grid=grid,
        num_tokens=rows * columns // 4 * (1 if kind == "image" else frames // 2),
        digest=f"{kind}-{grid}-{seed}".encode(),
    )


def text_ids(count: int, seed: int = 0) -> list[int]:
    """Ids that are no marker."""
    return torch.randint(3, 340, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_of(*parts: Sequence[int] | Media, ids: Mapping[str, int] = IDS) -> Prompt:
    """A prompt of token ids and media, each of these between its markers."""
    token_ids: list[int] = []
    placed: list[PlacedMedia] = []
    for part in parts:
        if not isinstance(part, Media):
            token_ids += part
            continue
        name = part.kind.upper()
        token_ids.append(ids[f"<|{name}_START|>"])
        placed.append(PlacedMedia(first=len(token_ids), media=part))
        token_ids += [ids[f"<|{name}_PLACEHOLDER|>"]] * part.num_tokens
        token_ids.append(ids[f"<|{name}_END|>"])
    return Prompt(text="", token_ids=tuple(token_ids), media=tuple(placed))


def reference_logits(reference: Any, prompt: Prompt, positions: Tensor | None = None) -> Tensor:
    """transformers' logits [T, V]; `positions` [T, 3] (time, height, width) instead of its own."""
    kinds = torch.zeros(1, len(prompt), dtype=torch.int32)
    routed = kinds.clone()
    for item in prompt.media:
        token_type = 1 if item.media.kind == "image" else 2
        kinds[0, item.first : item.end] = token_type
        routed[0, item.first - 1 : item.end + 1] = token_type
    given: dict[str, Any] = {}
    for kind, pixels, grid in (("image", "pixel_values", "image"), ("video", "pixel_values_videos", "video")):
        own = [item.media for item in prompt.media if item.media.kind == kind]
        if own:
            given[pixels] = torch.cat([normalized(media) for media in own])
            given[f"{grid}_grid_thw"] = torch.tensor([media.grid for media in own])
    if prompt.media:
        given |= {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": routed}
    if positions is not None:
        given["position_ids"] = positions.T[:, None]
    reference.model.rope_deltas = None
    with torch.inference_mode():
        logits: Tensor = reference(input_ids=torch.tensor([prompt.token_ids]), **given).logits[0]
    return logits


def normalized(media: Media) -> Tensor:
    """Its patches as transformers' processor gives them."""
    channels = media.patches.view(len(media.patches), 3, -1).float() / 255
    return ((channels - torch.tensor(_MEAN)[:, None]) / torch.tensor(_STD)[:, None]).flatten(1)


@contextmanager
def recorded_routing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Tensor]]]:
    """Every call of a router in here: which router (its weight's address) and the experts it chose [N, K]."""
    calls: list[tuple[int, Tensor]] = []

    def recording(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        chosen, shares = route(x, weight, *others)
        calls.append((weight.data_ptr(), chosen))
        return chosen, shares

    with monkeypatch.context() as patched:
        patched.setattr(decoder, "route", recording)
        yield calls
