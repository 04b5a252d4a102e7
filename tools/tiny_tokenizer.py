"""Train and save the one sentencepiece tokenizer of the tiny family, and encode with it as the SDK does."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import sentencepiece

from ernie45.testing import task_facts, task_words
from ernie45.testing.task_items import CHINESE_DIGITS
from ernie45.testing.tasks import task_names, tasks

BEGIN: Final = "<|begin_of_sentence|>"
END: Final = "<|end_of_sentence|>"
EOS: Final = "</s>"
SPECIAL_TOKENS: Final = (
    "<|IMAGE_PLACEHOLDER|>",
    "<|VIDEO_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|im_start|>",
    "<|im_end|>",
)
# Parsed as one token each but kept in decoded text, where reply parsers look for them.
TEXT_TOKENS: Final = (
    "<think>",
    "</think>",
    "<response>",
    "</response>",
    "<tool_list>",
    "</tool_list>",
    "<tool_call>",
    "</tool_call>",
    "<tool_output>",
    "</tool_output>",
)
NUM_PIECES: Final = 2040 - len(SPECIAL_TOKENS) - len(TEXT_TOKENS)
CORPUS_SEED: Final = 45
# What the other members of the family will say: the Thinking template, sums step by step, pictures and clips.
FAMILY_TEXTS: Final = (
    "system\nuser\nassistant\ntool\n<global_setting>\nthink_mode=\nsystem_setting",
    "first we add then so the sum is",
    "Picture\nVideo\nshape colour picture video circle square triangle star cross heart ring diamond",
    "How many shapes are there one two three four five count",
    "Where is it? top left middle centre right bottom row column moved up down from to",
    "图片里有几个图形 什么形状 视频 圆形 方形 三角形 星形 左上 右下 中间 向上 向下 移动",
    "red blue green yellow orange purple black white",
)


def corpus_lines() -> Iterator[str]:
    """Training text, cut so that the pieces stay easy to copy.

    A cut before each capital keeps the space out of names, so that a name is the same pieces after a space
    and after a quote. Chinese numerals and words in capitals are left out, to stay single characters.
    """
    for name in task_names("ernie45/tiny-dense"):
        if name in ("reverse", "numerals"):
            drawn = tasks(name, 1000, seed=CORPUS_SEED, split="train")
            left_out = f"[A-Z]{{2,}}|[{CHINESE_DIGITS}十百]+"
            texts = [re.sub(left_out, "\n", task.messages[0]["content"]) for task in drawn]
        else:
            drawn = tasks(name, 3000 if name in ("copy_replace", "tools") else 1000, seed=CORPUS_SEED, split="train")
            texts = [text for task in drawn for text in (*(m["content"] for m in task.messages), task.answer)]
        for text in texts:
            yield from _cut(text)
    facts = [cell for relation in task_facts.RELATIONS for row in relation.facts for cell in row]
    for word in (*task_words.NAMES, *task_words.CITIES, *task_words.WEATHERS):
        yield from [word] * 260
    for cell in facts:
        yield from _cut("\n".join([cell] * 20))
    for text in FAMILY_TEXTS:
        yield from _cut("\n".join([text] * 200))
    yield from ["User"] * 1000
    yield from ["Assistant"] * 1000


def _cut(text: str) -> Iterator[str]:
    for line in re.split(r"\n|(?=[A-Z])|(?<= )(?=[A-Z])", text):
        if line.strip(" "):
            yield line.rstrip(" ")


def train_sentencepiece() -> bytes:
    """The family's byte-fallback BPE model of `NUM_PIECES` pieces, as the bytes of tokenizer.model."""
    characters = "".join(chr(code) for code in range(33, 127) if not chr(code).isdigit())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus_lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars=characters + CHINESE_DIGITS + "十百",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=[*"0123456789", BEGIN, END],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class TinyTokenizer:
    """Plain sentencepiece plus splitting on added tokens: the ids the SDK makes of a text."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        names = (*SPECIAL_TOKENS, *TEXT_TOKENS)
        self.added = {name: NUM_PIECES + place for place, name in enumerate(names)}
        self.named = {token: self.pieces.piece_to_id(token) for token in ("<unk>", "<s>", EOS, BEGIN, END)}
        self.ids = self.named | self.added
        self._splitter = re.compile("(" + "|".join(re.escape(token) for token in self.ids) + ")")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added."""
        ids: list[int] = []
        for part in self._splitter.split(text):
            if part in self.ids:
                ids.append(self.ids[part])
            elif part:
                ids.extend(self.pieces.encode(part))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, added tokens included."""
        names = {token_id: name for name, token_id in self.added.items()}
        text = ""
        run: list[int] = []
        for token_id in [*ids, None]:
            if token_id is None or token_id in names:
                text += self.pieces.decode(run)
                run = []
                text += names[token_id] if token_id is not None else ""
            else:
                run.append(token_id)
        return text

    def save(self, folder: Path) -> None:
        """Write tokenizer.model and the configuration files beside it."""
        (folder / "tokenizer.model").write_bytes(self.model)
        kept_in_text = set(TEXT_TOKENS)
        decoder = {
            str(token_id): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": name not in kept_in_text,
            }
            for name, token_id in self.ids.items()
        }
        roles = {"bos_token": "<s>", "eos_token": EOS, "unk_token": "<unk>", "pad_token": "<unk>"}
        roles |= {"cls_token": BEGIN, "sep_token": END}
        special = {**roles, "additional_special_tokens": list(SPECIAL_TOKENS)}
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "tokenizer_class": "Ernie4_5_Tokenizer",
        }
        for name, value in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special),
            ("added_tokens.json", self.added),
        ):
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
