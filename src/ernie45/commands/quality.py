"""`ernie45 quality`: what each way to load a model costs in right answers, perplexity and logits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ernie45.catalogue import find
from ernie45.commands.quality_report import PresetQuality, QualityReport
from ernie45.errors import ErnieError, InvalidRequestError, OutOfMemoryError, UnsupportedError
from ernie45.memory.budget import KVDtype, check_kv_dtype
from ernie45.model import ErnieModel
from ernie45.parameters import count_parameters
from ernie45.presets import PRESETS, QuantPreset, find_preset
from ernie45.testing import Task, task_names, tasks
from ernie45.types.prompts import Prompt

WINDOW_TOKENS = 256
"""A text is scored in pieces of this length: any model's context has room for one."""

_KEPT_BYTES = 512 << 20  # of the reference's logits
_REPLY_TOKENS = 128  # twice the longest right one; what is longer is wrong
_TOOL_CALL = "<tool_call>"

SAMPLE_TEXT = """\
The ferry leaves at seven, long before the shops open, and on most mornings it carries more bicycles than people. \
Anna sits by the window on the left, because from there she can see the lighthouse and the row of white houses behind \
it. Her grandfather painted three of them. He used to say that a wall has to dry for as long as it takes to drink two \
cups of coffee and to tell one story, and that a painter who has no stories should learn another trade.

To boil an egg, bring a small pot of water to the boil, lower the egg into it with a spoon, and wait. After six \
minutes the white is firm and the yolk still runs; after nine, both are firm. Cold water afterwards stops the cooking, \
and makes the shell come off more easily. High in the mountains water boils at a lower temperature, so everything \
takes longer.

春天到了，院子里的两棵桃树开了花。每天早上，奶奶都会搬一把椅子坐在树下，一边剥豆子，一边听收音机里的新闻。\
她说，年轻的时候村里没有电，晚上大家就围在一起讲故事，谁讲得好，谁就能多吃一块红薯。\
现在孩子们都到城里工作去了，只有过年的时候才回来，不过电话倒是每个星期都会打。

A list in Python keeps its items in order, and a set does not. To count how often each word occurs in a text, split \
the text at its spaces and add one to an entry of a dictionary for every word: `counts[word] = counts.get(word, 0) + \
1`. Sorting the entries by their values then shows the most frequent words, which in nearly every text are also the \
shortest.

水在零摄氏度结冰，在一百摄氏度沸腾，这是在海平面上的情况。海拔越高，气压越低，沸点也就越低，所以在高原上煮饭要用高压锅。\
如果把盐放进水里，冰点会下降，这就是冬天在路面上撒盐的原因。

The museum has two floors. On the first are the ships: a fishing boat from 1890, half of a rowing boat that was found \
in the river, and a model of the harbour as it was a hundred years ago, with every crane in its place. On the second \
floor are letters and maps. Children under twelve pay nothing, students pay half, and on the first Sunday of the \
month everybody is free to come in. 博物馆星期一不开门，其他时间从上午九点开到下午五点。
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """Tokens to score: `positions` are those whose next token counts."""

    prompt: Prompt
    positions: Sequence[int]


def quality(
    model: str | os.PathLike[str],
    *,
    presets: Sequence[str | QuantPreset] = tuple(PRESETS),
    kv_dtypes: Sequence[KVDtype] = ("auto",),
    num_items: int = 50,
    seed: int = 0,
    text_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> QualityReport:
    """Load a model in one way after the other, and compare each with the first that fits: "none", then `presets`.

    A built-in model is asked `num_items` unseen questions of each of its tasks, and the right replies are the texts
    that are scored. For any other model that is a short text in English and Chinese.

    Args:
        kv_dtypes: how keys and values are kept, each with each preset.
        text_file: a text to score instead, in UTF-8; then no tasks are asked.
        progress: show bars while loading, where there is a terminal or a notebook.

    Raises:
        InvalidRequestError: an unknown preset or dtype, no items, or a text that cannot be read or is too short.
        ErnieError: what `ErnieModel.from_pretrained` raises, where the model cannot be loaded in any of the ways.
    """
    chosen = [_checked_preset(preset) for preset in dict.fromkeys(("none", *presets))]
    for kv_dtype in kv_dtypes:
        check_kv_dtype(kv_dtype)
    questions = _questions(model, num_items, seed) if text_file is None else {}
    text = SAMPLE_TEXT if text_file is None else _read_text(Path(text_file))
    samples: list[_Sample] = []
    reference = _Reference()
    rows: list[PresetQuality] = []
    failures: list[ErnieError] = []
    notes: list[str] = []
    for preset in dict.fromkeys(chosen):
        for kv_dtype in dict.fromkeys(("auto", *kv_dtypes)):
            try:
                loaded = ErnieModel.from_pretrained(
                    model,
                    quantization=preset,
                    kv_dtype=kv_dtype,
                    max_batch=None if questions else 1,
                    progress=progress,
                )
            except (OutOfMemoryError, UnsupportedError) as error:
                failures.append(error)
                notes.append(f"{preset.name} (keys and values: {kv_dtype}) was left out: {error.message}")
                continue
            with loaded:
                samples = samples or list(_samples(loaded, questions, text))
                rows.append(_measure(loaded, preset.name, kv_dtype, samples, questions, reference))
    if not rows:
        raise failures[0]
    return QualityReport(
        model=str(model),
        texts=_describe_texts(questions, text_file),
        num_tokens=sum(len(sample.positions) for sample in samples),
        num_compared=reference.num_compared,
        num_items=num_items if questions else 0,
        seed=seed,
        rows=tuple(rows),
        notes=tuple(notes),
    )


class _Reference:
    """The logits that others are compared with: those of the model that was first to give any."""

    def __init__(self) -> None:
        self._likeliest: dict[int, Tensor] = {}
        self._logits: dict[int, Tensor] = {}
        self._room_bytes = _KEPT_BYTES

    @property
    def num_compared(self) -> int:
        return sum(map(len, self._logits.values()))

    def compare(self, index: int, logits: Tensor) -> tuple[int, float, float]:
        """For sample number `index`: at how many positions the most likely token is the same, the squares of the
        logits' differences, and those of the reference's logits, both 0 beyond what is kept."""
        likeliest = logits.argmax(dim=1)
        if index not in self._likeliest:
            self._likeliest[index] = likeliest
            if not self._logits or logits.nbytes <= self._room_bytes:
                self._logits[index] = logits
                self._room_bytes -= logits.nbytes
        num_equal = int((likeliest == self._likeliest[index]).sum())
        kept = self._logits.get(index)
        if kept is None:
            return num_equal, 0.0, 0.0
        return num_equal, _squares(logits - kept), _squares(kept)


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _measure(
    model: ErnieModel,
    preset: str,
    kv_dtype: str,
    samples: Sequence[_Sample],
    questions: Mapping[str, Sequence[Task]],
    reference: _Reference,
) -> PresetQuality:
    logprobs: list[float] = []
    num_equal, error, norm = 0, 0.0, 0.0
    for index, sample in enumerate(samples):
        logits = model.logits(sample.prompt, sample.positions)
        following = torch.tensor([sample.prompt.token_ids[position + 1] for position in sample.positions])
        logprobs += (logits.gather(1, following[:, None])[:, 0] - logits.logsumexp(1)).tolist()
        found = reference.compare(index, logits)
        num_equal, error, norm = num_equal + found[0], error + found[1], norm + found[2]
    weight_bytes = model.load_report.weight_bytes
    return PresetQuality(
        preset=preset,
        kv_dtype=kv_dtype,
        weight_bytes=weight_bytes,
        bytes_per_parameter=weight_bytes / count_parameters(model.spec).total,
        perplexity=math.exp(-math.fsum(logprobs) / len(logprobs)),
        agreement=num_equal / len(logprobs),
        logits_error=math.sqrt(error / norm) if norm else 0.0,
        num_right=_count_right(model, questions),
    )


def _count_right(model: ErnieModel, questions: Mapping[str, Sequence[Task]]) -> dict[str, int]:
    """Exactly right greedy replies, by task."""
    asked = [item.messages for items in questions.values() for item in items]
    replies = iter(model.batch_chat(asked, temperature=0, max_new_tokens=_REPLY_TOKENS) if asked else ())
    return {name: sum(next(replies).text == item.answer for item in items) for name, items in questions.items()}


def _samples(model: ErnieModel, questions: Mapping[str, Sequence[Task]], text: str) -> Iterable[_Sample]:
    """Questions with their right replies, the tasks taking turns; or else pieces of a text."""
    if questions:
        yield from (_answered(model, item) for item in chain.from_iterable(zip(*questions.values(), strict=True)))
        return
    token_ids = model.tokenizer.encode(text)
    if len(token_ids) < 2:
        raise InvalidRequestError(
            f"a text to score needs at least two tokens, not {len(token_ids)}", hint="some pages say more"
        )
    step = min(WINDOW_TOKENS, model.context_tokens)
    for start in range(0, len(token_ids) - 1, step):
        window = tuple(token_ids[start : start + step])
        yield _Sample(prompt=Prompt(text="", token_ids=window), positions=range(len(window) - 1))


def _answered(model: ErnieModel, item: Task) -> _Sample:
    """A question with its right reply, whose tokens alone are scored: the tiny models never learnt to ask."""
    question = model.render(item.messages)
    reply = item.answer
    if question.thinking:
        said = reply if reply.startswith(_TOOL_CALL) else f"<response>\n{reply}\n</response>"
        reply = f"{item.reasoning}\n</think>\n\n{said}"
    token_ids = (*question.token_ids, *model.tokenizer.encode(reply))
    return _Sample(
        prompt=replace(question, token_ids=token_ids), positions=range(len(question) - 1, len(token_ids) - 1)
    )


def _questions(model: str | os.PathLike[str], num_items: int, seed: int) -> dict[str, list[Task]]:
    """Unseen questions by task, for a model that has tasks."""
    entry = find(str(model))
    if entry is None or not entry.built_in:
        return {}
    return {name: tasks(name, num_items, seed=seed, split="test") for name in task_names(entry.name)}


def _checked_preset(quantization: str | QuantPreset) -> QuantPreset:
    preset = find_preset(quantization)
    if preset is None:
        raise InvalidRequestError(
            f"the preset {quantization!r} depends on the machine", hint=f"name some of {', '.join(PRESETS)}"
        )
    return preset


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}", hint="give a text file in UTF-8") from error


def _describe_texts(questions: Mapping[str, Sequence[Task]], text_file: str | os.PathLike[str] | None) -> str:
    if text_file is not None:
        return Path(text_file).name
    return "right replies to unseen questions" if questions else "a short text in English and Chinese"
