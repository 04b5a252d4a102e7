"""Evaluate a saved tiny model by greedy generation and write its model card."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from tiny_tokenizer import TinyTokenizer
from tiny_training import LogRow
from transformers import Ernie4_5ForCausalLM

from ernie45.testing import task_items, task_tools
from ernie45.testing.task_facts import RELATIONS
from ernie45.testing.tasks import Task, task_names, tasks

MAX_NEW_TOKENS: Final = 80
ROWS_PER_BATCH: Final = 32

WHAT: Final[Mapping[str, str]] = {
    "arithmetic": "add or subtract two numbers from 0 to 99",
    "compare": "the larger or smaller of two different numbers below 1,000",
    "reverse": "spell a word of 4 to 8 capital letters backwards",
    "sort": "put four numbers below 100 in ascending order",
    "facts": "sixty facts: capitals, opposites, chemical symbols (unseen: a wording of that fact)",
    "extract": "name, age (1 to 99) and city as JSON; names and cities from the published lists",
    "copy_replace": "copy a sentence of 8 to 40 listed words with one word, not the first, replaced",
    "recall": "repeat what the user said two turns earlier",
    "tools": "call one of three offered tools (of six known), or answer from its result",
    "numerals": "write 0 to 999 as Chinese numerals, or Chinese numerals as digits",
}


def evaluate_folder(
    folder: Path, tokenizer: TinyTokenizer, model_name: str, *, num_items: int, seed: int
) -> dict[str, float]:
    """Share of unseen items answered exactly by greedy decoding, per task, with the saved bfloat16 weights."""
    model = Ernie4_5ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    shares = {}
    for name in task_names(model_name):
        drawn = tasks(name, num_items, seed=seed, split="test")
        replies = generate_greedily(model, tokenizer, drawn)
        shares[name] = sum(reply == task.answer for reply, task in zip(replies, drawn, strict=True)) / num_items
    return shares


def generate_greedily(model: Ernie4_5ForCausalLM, tokenizer: TinyTokenizer, drawn: Sequence[Task]) -> list[str]:
    """Replies in order. A batch holds prompts of one length, so that nothing is padded."""
    prompts = [tokenizer.encode_task(task)[0] for task in drawn]
    places_by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places_by_length[len(prompt)].append(place)
    replies = [""] * len(prompts)
    for num_prompt, places in places_by_length.items():
        for start in range(0, len(places), ROWS_PER_BATCH):
            batch = places[start : start + ROWS_PER_BATCH]
            ids = torch.tensor([prompts[place] for place in batch])
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            for place, row in zip(batch, out[:, num_prompt:].tolist(), strict=True):
                reply = row[: row.index(tokenizer.ids["</s>"])] if tokenizer.ids["</s>"] in row else row
                replies[place] = tokenizer.decode(reply)
    return replies


def write_card(
    folder: Path,
    results: Mapping[str, float],
    history: Sequence[LogRow],
    *,
    num_items: int,
    seed: int,
    command: str,
) -> None:
    """Write README.md: what the model does, its prompt forms, results and training log."""
    parts = [
        CARD_HEAD.format(num_items=num_items, seed=seed),
        _results_table(results, num_items),
        PROMPT_FORMS,
        _wordings(),
        CARD_TRAINING.format(
            command=command,
            num_steps=history[-1].step,
            million_tokens=history[-1].tokens / 1e6,
            minutes=history[-1].seconds / 60,
        ),
        _log_table(history),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _results_table(results: Mapping[str, float], num_items: int) -> str:
    lines = ["| task | what | exact |", "|---|---|---|"]
    lines += [f"| {name} | {WHAT[name]} | {100 * share:.1f} % |" for name, share in results.items()]
    mean = sum(results.values()) / len(results)
    lines.append(f"| all | {num_items} unseen items of each | {100 * mean:.1f} % |")
    return "\n".join(lines) + "\n"


def _wordings() -> str:
    groups = {
        "arithmetic": (*task_items.ADDITION, *task_items.SUBTRACTION),
        "compare": (*task_items.LARGER, *task_items.SMALLER),
        "reverse": task_items.REVERSE,
        "sort": task_items.SORT,
        "facts": [[*relation.english, *relation.chinese] for relation in RELATIONS],
        "extract": (*task_items.EXTRACT, task_items.PROFILES, task_items.PROFILES_ZH),
        "copy_replace": task_items.COPY,
        "recall": [
            [f"{said} ... {asked}" for said, asked, _, _ in memories]
            for memories in (task_items.MEMORIES, task_items.MEMORIES_ZH)
        ],
        "tools": [kind.wordings for kind in task_tools.TOOL_KINDS],
        "numerals": (*task_items.TO_CHINESE, *task_items.TO_DIGITS),
    }
    lines = []
    for name, lists in groups.items():
        sample = tasks(name, 1, seed=random.Random(name).randrange(1000), split="test")[0]
        lines.append(f"- **{name}**: " + " · ".join(f"`{text}`" for texts in lists for text in texts))
        if len(sample.messages) == 1 and len(sample.answer) < 60:
            lines.append(f"  For example `{sample.messages[-1]['content']}` is answered `{sample.answer}`.")
    return "\n".join(lines) + "\n"


def _log_table(history: Sequence[LogRow]) -> str:
    names = list(WHAT)
    lines = [
        "| step | million tokens | minutes | loss | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 4),
    ]
    for row in history:
        shares = " | ".join(f"{100 * row.accuracy[name]:.0f}" for name in names)
        lines.append(f"| {row.step} | {row.tokens / 1e6:.1f} | {row.seconds / 60:.0f} | {row.loss:.3f} | {shares} |")
    return "\n".join(lines) + "\n"


CARD_HEAD: Final = """\
---
license: apache-2.0
language: [en, zh]
library_name: transformers
---
# ernie45/tiny-dense

A real ERNIE 4.5 dense model, small enough to ship: 4 layers, width 256, 4 heads sharing 2 key-value
heads, 2.9 million parameters in bfloat16. It was trained from scratch by `tools/train_tiny.py` of the
ernie45 repository on text that the script itself writes, and does ten small tasks in English and Chinese.
It exists so that every example and test has a right answer offline, in seconds. It knows nothing else:
ask it anything but these tasks and it answers nonsense.

Nothing in it comes from the published weights. The tokenizer is a sentencepiece BPE of 2,022 pieces with
ERNIE's markers added; the other members of the tiny family use the same one. The chat template is ours
and renders plain messages as the published text models do.

## What it can do

Greedy replies, saved bfloat16 weights, {num_items} items of each task that training never saw
(`ernie45.testing.tasks(name, {num_items}, seed={seed}, split="test")`), counted right only
when every character is.
"""

PROMPT_FORMS: Final = """\
## Prompt forms

Outside these forms and ranges it is unreliable. Half-finished text works without a template for two
kinds: sums (`47 + 38 =`) and facts (`The capital of France is`, `法国的首都是`). A statement of the recall
task on its own is answered `Noted.` or `记住了。`. The subjects of `facts` and its wordings are in
`ernie45/testing/task_facts.py`, the names, cities and sentence words in `ernie45/testing/task_words.py`.
Tools may be given as `tools=` or as text; the six tools it knows are in `ernie45/testing/task_tools.py`, and
a call looks like this:

```
<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
```
"""

CARD_TRAINING: Final = """\
## How it was trained

```
{command}
```

{num_steps:,} steps, {million_tokens:.1f} million tokens, {minutes:.0f} minutes on 2 CPU cores that had
other work to do as well. transformers' `Ernie4_5ForCausalLM`, Muon on the matrices and AdamW on
embeddings and norms, loss on answers only, the mix of tasks following what training still got wrong.
Exact answers on 100 other unseen items per task (per cent, by one forward pass over prompt and answer)
along the way:
"""
