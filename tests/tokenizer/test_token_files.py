from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import TokenizerError
from ernie45.tokenizer.token_files import read_token_files


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def test_absent_files_say_nothing(tmp_path: Path) -> None:
    files = read_token_files(tmp_path)
    assert (files.added_ids, files.special, files.roles, files.chat_template) == ({}, (), {}, None)


def test_all_files_are_joined(tmp_path: Path) -> None:
    config = {
        "added_tokens_decoder": {"9": {"content": "<a>", "special": True}, "10": {"content": "<b>"}},
        "eos_token": "</s>",
        "pad_token": None,
        "add_bos_token": False,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    write(tmp_path, "tokenizer_config.json", config)
    write(
        tmp_path,
        "special_tokens_map.json",
        {"cls_token": {"content": "<c>"}, "additional_special_tokens": ["<d>"]},
    )
    write(tmp_path, "added_tokens.json", {"<e>": 11})
    files = read_token_files(tmp_path)
    assert files.added_ids == {"<a>": 9, "<b>": 10, "<e>": 11}
    assert set(files.special) == {"<a>", "<c>", "<d>", "</s>"}
    assert files.roles == {"eos_token": "</s>", "cls_token": "<c>"}
    assert files.chat_template == "D"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<a>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"special": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"additional_special_tokens": [""]}),
        ("added_tokens.json", {"<a>": "9"}),
        ("added_tokens.json", {"": 9}),
        ("added_tokens.json", {"x" * 101: 9}),
        ("special_tokens_map.json", {"eos_token": {"content": 2}}),
        ("special_tokens_map.json", {"additional_special_tokens": 3}),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, name, value)
    with pytest.raises(TokenizerError, match=f"{name} is broken"):
        read_token_files(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_files_that_are_not_json_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is broken"):
        read_token_files(tmp_path)


def test_flags_that_change_matching_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "special_tokens_map.json", {"mask_token": {"content": "<m>", "lstrip": True}})
    with pytest.raises(TokenizerError, match="lstrip on the token '<m>'"):
        read_token_files(tmp_path)
