"""The JSON files beside a tokenizer: added tokens, special tokens and their roles, the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie45.errors import TokenizerError

MAX_FILE_BYTES = 100_000_000
_LIST_ROLES = ("additional_special_tokens", "extra_special_tokens")
_MAX_TOKEN_CHARACTERS = 100
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
    """Read the JSON files beside a tokenizer; absent ones say nothing.

    Raises:
        TokenizerError: one of them is not what it should be.
    """
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, special_map = read_json_object(config_path), read_json_object(map_path)
    added: dict[str, int] = {}
    special: dict[str, None] = {}
    roles: dict[str, str] = {}

    registered = config.get("added_tokens_decoder") or {}
    for token_id, entry in _object(registered, config_path, "added_tokens_decoder").items():
        content = _content(entry, config_path, "added_tokens_decoder")
        if not token_id.isdecimal():
            raise _broken(config_path, f"added_tokens_decoder has the id {token_id!r}")
        added[content] = int(token_id)
        if isinstance(entry, dict) and entry.get("special"):
            special[content] = None
    added = {**_read_added_ids(folder / "added_tokens.json"), **added}

    for path, source in ((map_path, special_map), (config_path, config)):
        special.update(dict.fromkeys(_listed_tokens(source, path)))
        for key, entry in source.items():
            if key.endswith("_token") and isinstance(entry, (str, dict)) and entry:
                roles.setdefault(key, _content(entry, path, key))
    special.update(dict.fromkeys(roles.values()))
    template = _default_template(config, config_path)
    return TokenFiles(added_ids=added, special=tuple(special), roles=roles, chat_template=template)


def check_size(path: Path) -> None:
    """Raises TokenizerError when a file is larger than any tokenizer's (`MAX_FILE_BYTES`); an absent one passes."""
    num_bytes = path.stat().st_size if path.exists() else 0
    if num_bytes > MAX_FILE_BYTES:
        raise _broken(path, f"it has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        TokenizerError: the file cannot be read, or holds something else.
    """
    check_size(path)
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


def _read_added_ids(path: Path) -> dict[str, int]:
    ids = read_json_object(path)
    for content, token_id in ids.items():
        _content(content, path, "the file")
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise _broken(path, f"the id of {content!r} is {token_id!r}")
    return ids


def _listed_tokens(source: Mapping[str, Any], path: Path) -> list[str]:
    tokens: list[str] = []
    for key in _LIST_ROLES:
        entries = source.get(key) or []
        if isinstance(entries, dict):
            entries = list(entries.values())
        if not isinstance(entries, list):
            raise _broken(path, f"{key} is of type {type(entries).__name__}")
        tokens.extend(_content(entry, path, key) for entry in entries)
    return tokens


def _content(entry: object, path: Path, key: str) -> str:
    """The text of a token, which is written as a string or as an object with flags."""
    flags = entry if isinstance(entry, dict) else {}
    content = flags.get("content", "") if flags else entry
    if not isinstance(content, str) or not 0 < len(content) <= _MAX_TOKEN_CHARACTERS:
        raise _broken(path, f"{key} holds {str(entry)[:200]!r} where a token should be")
    for flag in _FLAGS:
        if flags.get(flag):
            raise TokenizerError(
                f"{path} asks for {flag} on the token {content!r}, which ernie45 does not do",
                hint="no published ERNIE 4.5 tokenizer needs it; set it to false if it came with a re-save",
            )
    return content


def _default_template(config: Mapping[str, Any], path: Path) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which "default" counts."""
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry.get("template") for entry in found if isinstance(entry, dict) and "name" in entry}
        found = named.get("default")
    if found is None or isinstance(found, str):
        return found
    raise _broken(path, f"chat_template is of type {type(found).__name__}")


def _broken(path: Path, why: str) -> TokenizerError:
    return TokenizerError(f"{path} is broken: {why}", hint="fetch the file again from where the checkpoint came from")
