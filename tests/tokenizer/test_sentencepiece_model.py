from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import TokenizerError
from ernie45.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small tokenizer that a test may change."""
    return Path(shutil.copytree(small_folder, tmp_path / "tokenizer"))


@pytest.fixture
def tokenizer(small_folder: Path) -> Tokenizer:
    return load(small_folder)


def load(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("text", ["", "the cat", "  two\n\tspaces 12", "你好 😀", "<control> <|plain|>"])
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_registered_tokens_are_found_in_text(tokenizer: Tokenizer) -> None:
    special, plain = tokenizer.token_id("<|special|>"), tokenizer.token_id("<|plain|>")
    ids = tokenizer.encode("the<|special|><|plain|>cat</s>")
    assert [i for i in ids if i in (special, plain, 2)] == [special, plain, 2]
    assert tokenizer.decode(ids) == "the<|plain|>cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the<|special|><|plain|>cat</s>"


def test_control_pieces_are_not_found_in_text(tokenizer: Tokenizer) -> None:
    control = tokenizer.token_id("<control>")
    assert control is not None
    assert control not in tokenizer.encode("<control>")


def test_the_longest_registered_token_wins(folder: Path) -> None:
    edit_config(folder, additional_special_tokens=["<a", "<ab", "<abcd>", "b>"])
    tokenizer = load(folder)
    ids = {name: tokenizer.token_id(name) for name in ("<a", "<ab", "<abcd>", "b>")}
    assert tokenizer.encode("<abcd><ab><abb>") == [
        ids["<abcd>"],
        ids["<ab"],
        *tokenizer.encode(">"),
        ids["<ab"],
        ids["b>"],
    ]


def test_added_tokens_json_alone_gives_ids(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    size = load(folder).size
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": size + 5}))
    tokenizer = load(folder)
    assert tokenizer.size == size + 6
    assert tokenizer.encode("<x>") == [size + 5]
    assert tokenizer.token_bytes(size + 5) == b"<x>"
    assert tokenizer.token_bytes(size) == b""


def test_several_threads_get_the_same_ids(tokenizer: Tokenizer) -> None:
    text = "the cat sat on the mat 😀 <|plain|>" * 50
    expected = tokenizer.encode(text)
    results: list[bool] = []

    def work() -> None:
        for _ in range(20):
            ids = tokenizer.encode(text)
            results.append(ids == expected and tokenizer.decode(ids) == text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x00" * 64])
def test_broken_model_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load(folder)


def test_cut_model_is_named(folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load(folder)


def test_files_of_different_checkpoints_are_refused(folder: Path) -> None:
    edit_config(folder, added_tokens_decoder={"5": {"content": "<x>", "special": True}})
    with pytest.raises(TokenizerError, match="'<x>' claims id 5"):
        load(folder)


def test_a_hundred_tokens_that_begin_one_another(folder: Path) -> None:
    edit_config(folder, additional_special_tokens=["x" * n for n in range(2, 101)])
    tokenizer = load(folder)
    assert tokenizer.encode("x" * 150) == [tokenizer.token_id("x" * 100), tokenizer.token_id("x" * 50)]
