"""The tasks the tiny family was trained on, for anyone who wants right answers offline.

```python
for task in tasks("arithmetic", 3, seed=1, split="test"):
    assert model.chat(task.messages, temperature=0).text == task.answer
```

Each task asks in English and, but for `tools`, also in Chinese. One wording of each task of text (all of them stand
in `task_items`, `task_facts` and `task_tools`; the lists in `task_words`):

| name | prompt | answer |
|---|---|---|
| arithmetic | `What is 47 - 52?` (numbers 0 to 99, `+` or `-`) | `47 - 52 = -5` |
| compare | `Which is larger, 523 or 87?` (different numbers below 1,000; larger or smaller) | `523` |
| reverse | `Reverse the word PLANET.` (4 to 8 capital letters) | `TENALP` |
| sort | `Sort these numbers: 42, 7, 19, 88` (four numbers below 100) | `7, 19, 42, 88` |
| facts | `What is the capital of France?` (capitals, opposites, chemical symbols: 60 facts) | `Paris` |
| extract | `Extract name, age and city as JSON: Maria is 34 years old and lives in Oslo.` | a JSON object |
| copy_replace | `Replace lakes with roads in this sentence: Two ...` (8 to 40 words) | the changed sentence |
| recall | `My name is Maria.` ... a turn between ... `What is my name?` | `Your name is Maria.` |
| tools | three tools in the system message; `What time is it in Oslo?` | a call, or a reply from its result |
| numerals | `Write 347 in Chinese numerals.` (0 to 999; also back to digits) | `三百四十七` |
| sums | `What is 12 + 30 + 9?` (three numbers 0 to 99; for tiny-moe) | `51`, after a line of reasoning |

And for tiny-vl, whose messages hold Pillow pictures (`{"type": "image", "image": …}`) and clips
(`{"type": "video", "video": [frame, …]}`) before or after the text; the wordings stand in `task_pictures`:

| name | prompt | answer |
|---|---|---|
| shape | a picture, `What shape is this?`; or two or three, `What shape is in Picture 2?` | `triangle` |
| colour | a picture, `What colour is the shape?`; or two or three, `What colour is the shape in Picture 2?` | `red` |
| count | a picture, `How many shapes are there?` (1 to 5) | `3` |
| place | a picture, `Where is the shape?` (in a 3 × 3 grid) | `top left` |
| motion | a clip of 4 to 8 frames, `What moved, and which way?` | `The red circle moved left.` |

For `shape`, `colour` and `place` some items ask a second question about a picture of an earlier turn.

An item belongs to the test split when the hash of its content says so, one in eight: for `arithmetic` that is
the pair of numbers and the sign, whatever the wording. Only for `facts`, where nobody could know an unseen fact,
the wording counts. What counts of pictures and clips is said in `task_pictures`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from ernie45.errors import InvalidRequestError
from ernie45.testing.task_items import (
    Item,
    Message,
    draw_arithmetic,
    draw_compare,
    draw_copy_replace,
    draw_extract,
    draw_facts,
    draw_numerals,
    draw_recall,
    draw_reverse,
    draw_sort,
    draw_sums,
    split_of,
)
from ernie45.testing.task_pictures import (
    PICTURE_KIND,
    draw_colour,
    draw_count,
    draw_media,
    draw_motion,
    draw_place,
    draw_shape,
)
from ernie45.testing.task_tools import draw_tools

SPLITS: Final = ("train", "test")

_TEXT_DRAWERS: Final[Mapping[str, Callable[[random.Random], Item]]] = {
    "arithmetic": draw_arithmetic,
    "compare": draw_compare,
    "reverse": draw_reverse,
    "sort": draw_sort,
    "facts": draw_facts,
    "extract": draw_extract,
    "copy_replace": draw_copy_replace,
    "recall": draw_recall,
    "tools": draw_tools,
    "numerals": draw_numerals,
    "sums": draw_sums,
}
_PICTURE_DRAWERS: Final[Mapping[str, Callable[[random.Random], Item]]] = {
    "shape": draw_shape,
    "colour": draw_colour,
    "count": draw_count,
    "place": draw_place,
    "motion": draw_motion,
}
_DRAWERS: Final = {**_TEXT_DRAWERS, **_PICTURE_DRAWERS}
# Pictures of one shape are one kind of content for the three tasks that ask about them.
_CONTENT_KINDS: Final = dict.fromkeys(("shape", "colour", "place"), PICTURE_KIND)
_MODEL_TASKS: Final[Mapping[str, tuple[str, ...]]] = {
    "ernie45/tiny-dense": tuple(name for name in _TEXT_DRAWERS if name != "sums"),
    "ernie45/tiny-moe": tuple(_TEXT_DRAWERS),
    "ernie45/tiny-vl": (*_PICTURE_DRAWERS, "compare", "facts"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with its one right answer, compared exactly with the reply's text.

    `reasoning` is what a thinking model may write before the answer, "" for all tasks of text but `sums`.
    """

    messages: tuple[Message, ...]
    answer: str
    reasoning: str = ""


def task_names(model_name: str) -> tuple[str, ...]:
    """Names of the tasks a built-in model was trained on.

    Raises:
        InvalidRequestError: `model_name` is not a built-in model.
    """
    if model_name not in _MODEL_TASKS:
        known = ", ".join(_MODEL_TASKS)
        raise InvalidRequestError(f"no tasks are known for model {model_name!r}", hint=f"Use one of: {known}.")
    return _MODEL_TASKS[model_name]


def tasks(name: str, n: int, *, seed: int, split: str) -> list[Task]:
    """Draw `n` items of one task, the same for the same seed; the two splits never share content.

    Args:
        name: One of `task_names(...)`.
        n: How many, at least 1. Small tasks repeat an item now and then.
        seed: Any integer.
        split: "train" (what the model may have seen) or "test" (what it cannot have seen).

    Raises:
        InvalidRequestError: an unknown task or split, or `n` below 1.
    """
    if name not in _DRAWERS:
        raise InvalidRequestError(f"unknown task {name!r}", hint=f"Use one of: {', '.join(_DRAWERS)}.")
    if split not in SPLITS:
        raise InvalidRequestError(f"unknown split {split!r}", hint='Use "train" or "test".')
    if n < 1:
        raise InvalidRequestError(f"n is {n}, but at least one item must be drawn", hint="Pass n >= 1.")
    rng = random.Random(f"{name} {split} {seed}")
    drawn: list[Task] = []
    while len(drawn) < n:
        item = _DRAWERS[name](rng)
        if split_of(_CONTENT_KINDS.get(name, name), item.content) == split:
            messages = tuple(draw_media(message) for message in item.messages)
            drawn.append(Task(messages=messages, answer=item.answer, reasoning=item.reasoning))
    return drawn
