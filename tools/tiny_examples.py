"""Training examples of the tiny models: tasks, and around them what a conversation adds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tiny_prompts import PicturePrompts, Prompts, ThinkingPrompts, media_parts
from tiny_tokenizer import EOS, TinyTokenizer

from ernie45.testing.task_facts import CAPITALS, OPPOSITES, SYMBOLS
from ernie45.testing.task_items import NOTED, NOTED_ZH
from ernie45.testing.tasks import Task, tasks
from ernie45.types.media import PlacedMedia

EXAMPLES_PER_STEP: Final = 80
COPY_GROWTH_SHARE: Final = 0.3
ACKNOWLEDGE_SHARE: Final = 0.1
EARLIER_TURN_SHARE: Final = 0.08
SYSTEM_SHARE: Final = 0.04
NATIVE_TOOLS_SHARE: Final = 0.5
NUM_COMPLETIONS: Final = 3
COMPLETION: Final = "completion"
SYSTEM_TEXTS: Final = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be precise.",
    "你是一个有用的助手。",
)
FACT_COMPLETIONS: Final = (
    (CAPITALS, "The capital of {} is", "{}的首都是"),
    (OPPOSITES, "The opposite of {} is", "{}的反义词是"),
    (SYMBOLS, "The chemical symbol of {} is", "{}的化学符号是"),
)
# How often a task comes while its training accuracy is 0, relative to the others.
PRIORS: Final[Mapping[str, float]] = {
    "arithmetic": 3.0,
    "compare": 1.0,
    "reverse": 1.2,
    "sort": 1.2,
    "facts": 1.0,
    "extract": 0.8,
    "copy_replace": 2.0,
    "recall": 0.6,
    "tools": 0.6,
    "numerals": 0.8,
    "sums": 1.2,
    "shape": 1.4,
    "colour": 0.7,
    "count": 1.2,
    "place": 1.0,
    "motion": 1.2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training example: its task, the ids of prompt and answer in one row, and how the row begins.

    `num_shared` ids at the front are the prompt form's shared prefix (0 where the row begins otherwise), and `placed`
    are the pictures and clips in the prompt.
    """

    task_name: str
    ids: list[int]
    num_prompt: int
    num_shared: int = 0
    placed: tuple[PlacedMedia, ...] = ()


def task_weights(
    names: Sequence[str], accuracy: Mapping[str, float], emphasis: Mapping[str, float]
) -> dict[str, float]:
    """The mix: weak tasks come more often, mastered ones keep a little; `emphasis` multiplies some tasks' share."""
    return {name: PRIORS[name] * emphasis.get(name, 1.0) * (0.12 + 1 - accuracy[name]) for name in names}


def encode_task(
    prompts: Prompts, name: str, task: Task, *, native_tools: bool = False, rng: random.Random | None = None
) -> Example:
    """A task as one row of ids.

    `native_tools` puts tools where the thinking template puts them; `rng` varies prompts of pictures for training.
    """
    if native_tools and isinstance(prompts, ThinkingPrompts):
        encoded = prompts.encode_native_tools(task)
    elif rng is not None and isinstance(prompts, PicturePrompts):
        encoded = prompts.encode_variant(task, rng)
    else:
        encoded = prompts.encode_task(task)
    shared = prompts.shared_prefix
    num_shared = len(shared) if encoded.prompt[: len(shared)] == shared else 0
    return Example(
        task_name=name,
        ids=encoded.prompt + encoded.reply,
        num_prompt=len(encoded.prompt),
        num_shared=num_shared,
        placed=encoded.placed,
    )


def draw_examples(
    prompts: Prompts, tokenizer: TinyTokenizer, weights: Mapping[str, float], seed: int, progress: float
) -> list[Example]:
    """One step's training examples; `progress` from 0 to 1 through the run lengthens the copied sentences."""
    rng = random.Random(seed)
    names = rng.choices(list(weights), list(weights.values()), k=EXAMPLES_PER_STEP - NUM_COMPLETIONS)
    max_words = 12 + 28 * min(1.0, progress / COPY_GROWTH_SHARE)
    drawn: list[tuple[str, Task]] = []
    for name in sorted(set(names)):
        wanted = names.count(name)
        # A sentence is short enough for the growing limit with a chance of 5 in 33 or better.
        choice = tasks(name, wanted * (12 if name == "copy_replace" else 1), seed=seed, split="train")
        if name == "copy_replace":
            choice = [task for task in choice if len(task.answer.split()) <= max_words]
        drawn += [(name, task) for task in choice[:wanted]]
    rng.shuffle(drawn)
    examples = []
    for place, (name, task) in enumerate(drawn):
        can_be_native = name == "tools" and isinstance(prompts, ThinkingPrompts)
        native_tools = can_be_native and rng.random() < NATIVE_TOOLS_SHARE
        if not native_tools:
            task = _vary(rng, task, earlier=drawn[place - 1][1])
        examples.append(encode_task(prompts, name, task, native_tools=native_tools, rng=rng))
    return examples + _draw_completions(tokenizer, rng, seed, with_sums="arithmetic" in weights)


def _vary(rng: random.Random, task: Task, earlier: Task) -> Task:
    """Now and then stop at an acknowledgement, or put an earlier turn or a system text first."""
    first = task.messages[0]
    acknowledged = len(task.messages) > 1 and task.messages[1]["content"] in (NOTED, NOTED_ZH)
    if acknowledged and rng.random() < ACKNOWLEDGE_SHARE:
        task = Task(messages=task.messages[:1], answer=task.messages[1]["content"])
    if first["role"] == "system":
        return task
    if len(earlier.messages) == 1 and rng.random() < EARLIER_TURN_SHARE and not _would_renumber(earlier, task):
        turn = (*earlier.messages, {"role": "assistant", "content": earlier.answer})
        task = replace(task, messages=turn + task.messages)
    if rng.random() < SYSTEM_SHARE:
        task = replace(task, messages=({"role": "system", "content": rng.choice(SYSTEM_TEXTS)}, *task.messages))
    return task


def _would_renumber(earlier: Task, task: Task) -> bool:
    """Whether `task` asks for a picture by its number, which pictures of `earlier` would change."""
    return len(media_parts(task)) > 1 and len(media_parts(earlier)) > 0


def _draw_completions(tokenizer: TinyTokenizer, rng: random.Random, seed: int, *, with_sums: bool) -> list[Example]:
    """Plain text to complete, without the chat template: half-finished facts, and sums where the model knows them."""
    texts = []
    for task in tasks("arithmetic", NUM_COMPLETIONS, seed=-1 - seed, split="train"):
        if rng.random() < 0.5 and with_sums:
            question, result = task.answer.split(" =")
            texts.append((f"{question} =", result))
        else:
            relation, english, chinese = rng.choice(FACT_COMPLETIONS)
            subject, answer, subject_zh, answer_zh = rng.choice(relation.facts)
            in_english = (english.format(subject), f" {answer}.")
            texts.append(in_english if rng.random() < 0.5 else (chinese.format(subject_zh), f"{answer_zh}。"))
    examples = []
    for text, rest in texts:
        prompt = tokenizer.encode(text)
        ids = [*prompt, *tokenizer.encode(rest), tokenizer.ids[EOS]]
        examples.append(Example(task_name=COMPLETION, ids=ids, num_prompt=len(prompt)))
    return examples
