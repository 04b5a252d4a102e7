"""The JSON files beside a tokenizer: added tokens, special tokens and their roles, the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.errors import TokenizerError

_LIST_ROLES = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFiles:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    `added_ids` maps each added token to its id. `special` holds the special tokens in the order of the files;
    some may have no id there. `roles` maps "cls_token" and the like to the token in that role.
    """

    added_ids: Mapping[str, int]
    special: tuple[str, ...]
    roles: Mapping[str, str]
    chat_template: str | None


def read_token_files(folder: Path) -> TokenFiles:
    """Read the JSON files beside a tokenizer.

    Raises:
        TokenizerError: one of them is not what it should be.
    """
    config = read_json_object(folder / "tokenizer_config.json")
    special_map = read_json_object(folder / "special_tokens_map.json")
    added: dict[str, int] = {}
    special: dict[str, None] = {}

    path = folder / "tokenizer_config.json"
    for token_id, entry in _object(
        config.get("added_tokens_decoder") or {}, path, "added_tokens_decoder"
    ).items():
        content = _content(entry, path, "added_tokens_decoder")
        if not token_id.isdecimal():
            raise _broken(path, f"added_tokens_decoder has the id {token_id!r}")
        added[content] = int(token_id)
        if entry.get("special"):
            special[content] = None
    path = folder / "added_tokens.json"
    for content, token_id in read_json_object(path).items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise _broken(path, f"the id of {content!r} is {token_id!r}")
        added.setdefault(content, token_id)

    roles: dict[str, str] = {}
    for path, source in (
        (folder / "special_tokens_map.json", special_map),
        (folder / "tokenizer_config.json", config),
    ):
        for key, value in source.items():
            if key.endswith("_token") and isinstance(value, (str, dict)):
                roles.setdefault(key, _content(value, path, key))
        for key in _LIST_ROLES:
            tokens = source.get(key) or ()
            for token in tokens.values() if isinstance(tokens, dict) else tokens:
                special[_content(token, path, key)] = None
    for content in roles.values():
        special[content] = None

    return TokenFiles(
        added_ids=added, special=tuple(special), roles=roles, chat_template=_default_template(config, folder)
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        TokenizerError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    return _object(value, path, "the file")


def _object(value: object, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _broken(path, f"{what} should be a JSON object, not {type(value).__name__}")
    return value


def _content(entry: object, path: Path, key: str) -> str:
    """The text of a token, which is written as a string or as an object with flags."""
    if isinstance(entry, str):
        return entry
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str) or not content:
        raise _broken(path, f"{key} holds {entry!r} where a token should be")
    for flag in _FLAGS:
        if entry.get(flag):
            raise TokenizerError(
                f"{path} asks for {flag} on the token {content!r}, which ernie45 does not do",
                hint="no published ERNIE 4.5 tokenizer needs it; set it to false if it came with a re-save",
            )
    return content


def _default_template(config: Mapping[str, Any], folder: Path) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" counts."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {
            entry["name"]: entry.get("template")
            for entry in found
            if isinstance(entry, dict) and "name" in entry
        }
        found = named.get("default")
    if found is None or isinstance(found, str):
        return found
    raise _broken(folder / "tokenizer_config.json", f"chat_template is of type {type(found).__name__}")


def _broken(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"{path} is broken: {why}", hint="fetch the file again from where the checkpoint came from"
    )
