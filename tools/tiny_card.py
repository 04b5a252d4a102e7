"""Evaluate a saved tiny model by greedy generation and write its model card."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tiny_card_texts import EXPERTS, HEAD, HEAD_FOR_TWO, MEMBER_TEXTS, TRAINING, WHAT
from tiny_examples import encode_task
from tiny_family import Member, TinyModel
from tiny_mtp import TrainedHead
from tiny_prompts import PicturePrompts, Prompts
from tiny_router import RouterBalance
from tiny_tokenizer import TinyTokenizer
from tiny_training import LogRow, answer_logits, exact_rows, make_passes

from ernie45.testing import task_items, task_pictures, task_tools
from ernie45.testing.task_facts import RELATIONS
from ernie45.testing.tasks import Task, task_names, tasks

MAX_NEW_TOKENS: Final = 112
ROWS_PER_BATCH: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The final evaluation: exact answers per task, and each expert's share of its router's choices, by its name."""

    exact: dict[str, float]
    expert_use: dict[str, list[float]]


def evaluate_folder(folder: Path, member: Member, tokenizer: TinyTokenizer, *, num_items: int, seed: int) -> Results:
    """Share of unseen items answered exactly by greedy decoding, per task, with the saved weights.

    With pictures in the prompts that is told from one forward pass over prompt and answer.
    """
    model = type(member.build()).from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = member.make_prompts(tokenizer)
    balance = RouterBalance(model)
    exact = {}
    for name in task_names(member.name):
        drawn = tasks(name, num_items, seed=seed, split="test")
        num_exact = 0
        for batch in make_passes([encode_task(prompts, name, task) for task in drawn]):
            with torch.inference_mode():
                logits = answer_logits(model, batch)
            num_exact += int(exact_rows(logits, batch).sum())
            balance.count(batch.num_tokens, num_columns=batch.ids.shape[1], is_vision=batch.is_vision)
        if not isinstance(prompts, PicturePrompts):
            replies = [prompts.read_answer(reply) for reply in generate_greedily(model, prompts, tokenizer, drawn)]
            num_exact = sum(reply == task.answer for reply, task in zip(replies, drawn, strict=True))
        exact[name] = num_exact / num_items
    shares = [layer.tolist() for layer in balance.shares()]
    return Results(exact=exact, expert_use=dict(zip(balance.names, shares, strict=True)))


def generate_greedily(model: TinyModel, prompts: Prompts, tokenizer: TinyTokenizer, drawn: Sequence[Task]) -> list[str]:
    """Whole replies in order. A batch holds prompts of one length, so that nothing is padded."""
    prompt_ids = [prompts.encode_task(task).prompt for task in drawn]
    places_by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompt_ids):
        places_by_length[len(prompt)].append(place)
    replies = [""] * len(prompt_ids)
    for num_prompt, places in places_by_length.items():
        for start in range(0, len(places), ROWS_PER_BATCH):
            batch = places[start : start + ROWS_PER_BATCH]
            ids = torch.tensor([prompt_ids[place] for place in batch])
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
                reply = row[: row.index(prompts.stop_id)] if prompts.stop_id in row else row
                replies[place] = tokenizer.decode(reply)
    return replies


def write_card(
    folder: Path,
    member: Member,
    results: Results,
    history: Sequence[LogRow],
    trained: TrainedHead | None,
    *,
    num_items: int,
    seed: int,
    command: str,
) -> None:
    """Write README.md: what the model does, its prompt forms, results, inner workings and training log."""
    texts = MEMBER_TEXTS[member.name]
    parts = [
        HEAD.format(
            name=member.name,
            introduction=texts.introduction,
            template=texts.template,
            num_items=num_items,
            seed=seed,
        ),
        _results_table(results.exact, num_items),
        texts.prompt_forms,
        _wordings(list(results.exact)),
    ]
    if results.expert_use:
        parts += [EXPERTS, _expert_table(results.expert_use)]
    if trained is not None:
        parts.append(HEAD_FOR_TWO.format(num_steps=trained.num_steps, minutes=trained.seconds / 60))
        parts.append(_row_of_shares(trained.acceptance))
    last = history[-1]
    parts += [
        TRAINING.format(
            command=command,
            num_steps=last.step,
            million_tokens=last.tokens / 1e6,
            minutes=last.seconds / 60,
            architecture=texts.architecture,
        ),
        _log_table(history),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _results_table(exact: Mapping[str, float], num_items: int) -> str:
    lines = ["| task | what | exact |", "|---|---|---|"]
    lines += [f"| {name} | {WHAT[name]} | {100 * share:.1f} % |" for name, share in exact.items()]
    mean = sum(exact.values()) / len(exact)
    lines.append(f"| all | {num_items} unseen items of each | {100 * mean:.1f} % |")
    return "\n".join(lines) + "\n"


def _expert_table(expert_use: Mapping[str, Sequence[float]]) -> str:
    num_experts = len(next(iter(expert_use.values())))
    lines = [
        "| layer | " + " | ".join(f"expert {place}" for place in range(num_experts)) + " |",
        "|" + "---|" * (num_experts + 1),
    ]
    for name, shares in expert_use.items():
        layer, _, rest = name.partition(".layers.")[2].partition(".")
        bank = {"mlp.text_moe.gate": ", text", "mlp.vision_moe.gate": ", vision"}.get(rest, "")
        lines.append(f"| {layer}{bank} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def _row_of_shares(shares: Mapping[str, float]) -> str:
    names = " | ".join([*shares, "all"])
    mean = sum(shares.values()) / len(shares)
    row = " | ".join(f"{100 * share:.1f}" for share in [*shares.values(), mean])
    return f"| {names} |\n|" + "---|" * (len(shares) + 1) + f"\n| {row} |\n"


def _wordings(names: Sequence[str]) -> str:
    groups: dict[str, Sequence[Sequence[str]]] = {
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
        "sums": task_items.SUMS,
        "count": task_pictures.COUNT,
        "motion": task_pictures.MOTION,
    }
    for attribute in task_pictures.ONE_PICTURE:
        forms = (task_pictures.ONE_PICTURE, task_pictures.NUMBERED_PICTURE)
        groups[attribute] = [texts for form in forms if attribute in form for texts in form[attribute]]
    lines = []
    for name in names:
        sample = tasks(name, 1, seed=random.Random(name).randrange(1000), split="test")[0]
        lines.append(f"- **{name}**: " + " · ".join(f"`{text}`" for texts in groups[name] for text in texts))
        if len(sample.messages) == 1 and len(sample.answer) < 60 and isinstance(sample.messages[0]["content"], str):
            lines.append(f"  For example `{sample.messages[-1]['content']}` is answered `{sample.answer}`.")
    return "\n".join(lines) + "\n"


def _log_table(history: Sequence[LogRow]) -> str:
    names = list(history[-1].accuracy)
    lines = [
        "| step | million tokens | minutes | loss | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 4),
    ]
    for row in history:
        shares = " | ".join(f"{100 * row.accuracy[name]:.0f}" for name in names)
        lines.append(f"| {row.step} | {row.tokens / 1e6:.1f} | {row.seconds / 60:.0f} | {row.loss:.3f} | {shares} |")
    return "\n".join(lines) + "\n"
