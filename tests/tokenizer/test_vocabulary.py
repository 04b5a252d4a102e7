"""Loading, and what both kinds of tokenizer have to do alike."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ernie45.errors import InvalidRequestError
from ernie45.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = [
    "",
    " ",
    "   three spaces, \t a tab and five     spaces ",
    "\n\n\r\n\ttabs\tand\nlines\n",
    "Hello wörld 你好 é😀 👩‍👩‍👧‍👦🇨🇳",
    "人工智能的发展前景如何？请用三句话回答。㍿ ﷽ 𠮷",
    "def f(x: int) -> int:\n    return {'a': [x ** 2 for _ in range(10)]}  # 100%\n",
    '<div class="a">&nbsp;</div> <s>a</s> <unk> < s> <|x|> <<s>> <|LOC_1|><|LOC_10|><|LOC_1001|>',
    "<|begin_of_sentence|>User: hi\nAssistant: yes<|end_of_sentence|>",
    "<mask:1><mask:2> <mask:4>x<|prefixoftext|><|IMAGE_PLACEHOLDER|> <|AUDIO_PLACEHOLDER|>",
    "▁x a ▁b ▁▁ <0x0A> \x00\x01\x7f \u00a0\u2003\u200b\ufeff\ufffd e\u0301 ① ½ ＡＢＣ",
    "3.14159 1,000,000 2024-01-01 x1y2 ١٢٣",
    "ФЫВА שלום مرحبا ไทย हिन्दी 한국어 ñandú",
]


@pytest.fixture(scope="module")
def json_folder(reference: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published tokenizer as tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("tokenizer-json")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def published(request: pytest.FixtureRequest, published_folder: Path) -> Tokenizer:
    model_file = request.param == "tokenizer.model"
    tokenizer = load_tokenizer(published_folder if model_file else request.getfixturevalue("json_folder"))
    assert tokenizer is not None
    return tokenizer


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = [
        *"aeinrst  ..,:;<>|/\\\"'(){}0123456789\n\t_ABC",
        *"你好的一是不，。",
        "é",
        "😀",
        "▁",
        "<s>",
        "<|LOC_7|>",
    ]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count)]


def test_golden_ids(published: Tokenizer, shared_data: Path) -> None:
    pairs = json.loads((shared_data / "golden" / "tokenization.json").read_text())["pairs"]
    assert [published.encode(pair["text"]) for pair in pairs] == [pair["ids"] for pair in pairs]


def test_encodes_and_decodes_as_transformers(published: Tokenizer, reference: PreTrainedTokenizerBase) -> None:
    for text in [*TEXTS, *random_texts(300)]:
        ids = published.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert published.decode(ids, skip_special_tokens=False) == reference.decode(ids), text
        assert published.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


def test_vocabulary_as_transformers(published: Tokenizer, reference: PreTrainedTokenizerBase) -> None:
    assert published.size == len(reference) == 101304
    assert published.special_token_ids == frozenset(reference.all_special_ids)
    every_id = range(published.size)
    assert [published.token_text(i) for i in every_id] == reference.convert_ids_to_tokens(list(every_id))
    assert [published.decode([i]) for i in (*range(1, 13), *range(269, published.size, 97))] == [
        reference.decode([i], skip_special_tokens=True) for i in (*range(1, 13), *range(269, published.size, 97))
    ]


def test_tokens_by_name(published: Tokenizer) -> None:
    assert published.token_id("<|end_of_sentence|>") == 100272
    assert published.token_id("</s>") == 2
    assert published.token_id("<mask:2>") == 100275
    assert published.token_id("<0x0A>") == 23
    assert published.token_id("<think>") is None


def test_token_bytes(published: Tokenizer) -> None:
    assert published.token_bytes(23) == b"\n"
    assert published.token_bytes(253) == b"\xf0"
    assert published.token_bytes(30802) == b" Hello"
    assert published.token_bytes(3) == b"0"
    assert published.token_bytes(2) == published.token_bytes(100272) == b""


@pytest.mark.parametrize("token_id", [-1, 101304, 103423, 10**9])
def test_ids_without_a_token_add_nothing(published: Tokenizer, token_id: int) -> None:
    assert published.token_bytes(token_id) == b""
    assert published.token_text(token_id) == ""
    assert published.decode([18830, token_id]) == "hello"


def test_bytes_that_are_not_utf8_become_replacement_characters(published: Tokenizer) -> None:
    emoji = published.encode("😀")
    assert len(emoji) == 4
    assert published.decode(emoji[:3]) == "\ufffd"
    assert published.decode([emoji[1], 18830]) == "\ufffdhello"


def test_lone_surrogate_is_refused(published: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"half a surrogate pair, '\\ud83d', at character 3"):
        published.encode("abc\ud83d")


def test_ids_are_the_same_without_the_file_of_added_ids(published_folder: Path, tmp_path: Path) -> None:
    """The layout of Baidu's first releases: names only, so ids follow the order of the list."""
    shutil.copy(published_folder / "tokenizer.model", tmp_path)
    config = json.loads((published_folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.size == 101304
    assert tokenizer.token_id("<|IMAGE_SEP|>") == 101303
    assert tokenizer.encode("<|LOC_1000|>a<mask:1>") == [101297, 93922, 100274]


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_loading_imports_no_heavy_library(small_folder: Path) -> None:
    """Cold start: torch, transformers and jinja2 take seconds."""
    script = (
        "import sys; from pathlib import Path; from ernie45.tokenizer import load_template, load_tokenizer; "
        "folder = Path(sys.argv[1]); load_template(folder); load_tokenizer(folder).encode('the cat'); "
        "print(sorted({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    command: Sequence[str] = [sys.executable, "-c", script, str(small_folder)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
