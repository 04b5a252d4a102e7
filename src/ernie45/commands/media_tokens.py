"""The ids of the tokens that stand for pictures and clips, as transformers' config names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie45.errors import ConfigError
from ernie45.tokenizer import load_tokenizer

_TOKENS = {
    "image_token_id": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token_id": "<|IMAGE_START|>",
    "image_end_token_id": "<|IMAGE_END|>",
    "video_token_id": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token_id": "<|VIDEO_START|>",
    "video_end_token_id": "<|VIDEO_END|>",
}


def media_token_ids(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Ids by transformers' config key: by the tokenizer's names, else as config.json says (`im_patch_id` is the
    published form's key for the placeholder of pictures). Those that neither knows are left out.

    Raises:
        ConfigError: the placeholder of pictures is not known, or an id is none.
        TokenizerError: the tokenizer's files are broken.
    """
    tokenizer = load_tokenizer(folder)
    ids: dict[str, int] = {}
    for key, token in _TOKENS.items():
        named = None if tokenizer is None else tokenizer.token_id(token)
        value = config.get(key) if named is None else named
        if value is None and key == "image_token_id":
            value = config.get("im_patch_id")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"config.json: {key} is {value!r}", hint="it must be a token id")
        ids[key] = value
    if "image_token_id" not in ids:
        raise ConfigError(
            "config.json: im_patch_id is missing, and there is no tokenizer that names the placeholder of pictures",
            hint="fetch config.json and the tokenizer files again",
        )
    return ids
