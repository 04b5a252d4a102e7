"""The training loop of the tiny models: loss on answers only, a mix that follows what is still weak."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from tiny_examples import (
    COMPLETION,
    EXAMPLES_PER_STEP,
    Example,
    draw_examples,
    encode_task,
    task_weights,
)
from tiny_family import Member, TinyModel
from tiny_lessons import LESSONS_FROM, teach
from tiny_media import MOE_TYPES, media_inputs
from tiny_optimizer import TinyOptimizer, sum_over_processes
from tiny_prompts import PicturePrompts, Prompts
from tiny_router import RouterBalance
from tiny_tokenizer import TinyTokenizer
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from ernie45.testing.tasks import task_names, tasks

PADDED_TOKENS_PER_PASS: Final = 1536
WARMUP_STEPS: Final = 50
CONSTANT_SHARE: Final = 0.1

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Examples of like length in one padded batch: `ids` [B, T], and where answers are predicted.

    All rows begin with the ids of `prefix`, which `ids` leaves out: it is computed once for the batch.
    `rows` and `columns` [N] index the hidden states that predict `targets` [N]; `weights` [N] weigh the loss.
    `num_tokens` [B] is how many of a row's ids are no padding. `media` are the model's inputs for pictures and clips.
    """

    task_names: list[str]
    prefix: list[int]
    ids: Tensor
    num_tokens: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    weights: Tensor
    media: Mapping[str, Tensor]

    @property
    def is_vision(self) -> Tensor | None:
        """Which tokens [B, T] belong to the vision experts; None in a pass without any."""
        return self.media[MOE_TYPES].bool() if self.media else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRow:
    """What the training log keeps of one evaluation."""

    step: int
    tokens: int
    seconds: float
    loss: float
    accuracy: dict[str, float]


def rate_factor(step: int, num_steps: int) -> float:
    """Share of the full learning rate: a warm-up, a constant stretch, then a straight line to 0."""
    constant_until = CONSTANT_SHARE * num_steps
    falling = (num_steps - step) / (num_steps - constant_until)
    return min(1.0, (step + 1) / WARMUP_STEPS, falling)


def make_passes(examples: list[Example]) -> list[Pass]:
    """Cut examples, sorted by length, into padded batches of at most `PADDED_TOKENS_PER_PASS` tokens."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: (example.num_shared, _own_length(example)), reverse=True):
        if (
            not groups
            or groups[-1][0].num_shared != example.num_shared
            or (len(groups[-1]) + 1) * _own_length(groups[-1][0]) > PADDED_TOKENS_PER_PASS
        ):
            groups.append([])
        groups[-1].append(example)
    return [_make_pass(group) for group in groups]


def _own_length(example: Example) -> int:
    return len(example.ids) - example.num_shared


def _make_pass(group: list[Example]) -> Pass:
    num_shared = group[0].num_shared
    ids = torch.zeros(len(group), max(map(_own_length, group)), dtype=torch.long)
    places: list[tuple[int, int, int, float]] = []
    for row, example in enumerate(group):
        ids[row, : _own_length(example)] = torch.tensor(example.ids[num_shared:])
        weight = (len(example.ids) - example.num_prompt) ** -0.5
        places += [
            (row, column - num_shared - 1, example.ids[column], weight)
            for column in range(example.num_prompt, len(example.ids))
        ]
    rows, columns, targets, weights = zip(*places, strict=True)
    return Pass(
        task_names=[example.task_name for example in group],
        prefix=group[0].ids[:num_shared],
        ids=ids,
        num_tokens=torch.tensor([_own_length(example) for example in group]),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
        media=media_inputs(ids, [example.placed for example in group]),
    )


def answer_logits(model: TinyModel, batch: Pass) -> Tensor:
    """Logits [N, V] at the answer positions. Right padding needs no mask: attention is causal."""
    cache = None
    if batch.prefix:
        cache = DynamicCache(config=model.config)
        model.model(input_ids=torch.tensor([batch.prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(batch.ids))
    hidden = model.model(
        input_ids=batch.ids, past_key_values=cache, use_cache=cache is not None, **batch.media
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[batch.rows, batch.columns])
    return logits.float()


def exact_rows(logits: Tensor, batch: Pass) -> Tensor:
    """Which rows [B] have every answer token on top: just those a greedy decoder would answer exactly."""
    wrong = torch.zeros(len(batch.task_names))
    wrong.index_add_(0, batch.rows, (logits.argmax(-1) != batch.targets).float())
    return wrong == 0


def measure(model: TinyModel, prompts: Prompts, names: Sequence[str], *, num_items: int, seed: int) -> dict[str, float]:
    """Exact-answer accuracy per task on unseen items, by one forward pass; the processes share the items."""
    right = torch.zeros(len(names))
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for place, name in enumerate(names):
            mine = tasks(name, num_items, seed=seed, split="test")[dist.get_rank() :: dist.get_world_size()]
            for batch in make_passes([encode_task(prompts, name, task) for task in mine]):
                right[place] += exact_rows(answer_logits(model, batch), batch).sum()
    model.train()
    sum_over_processes([right])
    return {name: float(right[place]) / num_items for place, name in enumerate(names)}


class Trainer:
    """One process's share of a training run."""

    def __init__(
        self,
        member: Member,
        model: TinyModel,
        tokenizer: TinyTokenizer,
        *,
        num_steps: int,
        seed: int,
        emphasis: Mapping[str, float],
        log: Log,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = member.make_prompts(tokenizer)
        self.names = task_names(member.name)
        self.num_steps = num_steps
        self.seed = seed
        self.emphasis = emphasis
        self.log = log
        self.optimizer = TinyOptimizer(model)
        self.balance = RouterBalance(model)
        self.accuracy = dict.fromkeys([*self.names, COMPLETION], 0.0)
        self.step = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self.history: list[LogRow] = []

    def run(self, *, checkpoint: Path | None, evaluate_every: int, stop_at: int) -> None:
        """Train up to step `stop_at`, evaluating and saving a checkpoint every `evaluate_every` steps."""
        started = time.monotonic() - self.seconds
        losses: list[float] = []
        while self.step < stop_at:
            if self.step == LESSONS_FROM and isinstance(self.prompts, PicturePrompts):
                teach(self.model, seed=self.seed, log=self.log)
            losses.append(self.train_step())
            self.seconds = time.monotonic() - started
            if self.step % 20 == 0:
                mean = sum(losses[-20:]) / len(losses[-20:])
                rate = self.num_tokens / self.seconds
                self.log(f"step {self.step} loss {mean:.4f} tokens/s {rate:.0f} seconds {self.seconds:.0f}")
            if self.step % evaluate_every == 0 or self.step == stop_at:
                self.evaluate(sum(losses) / len(losses))
                losses = []
                if checkpoint is not None and dist.get_rank() == 0:
                    self.save(checkpoint)

    def train_step(self) -> float:
        """One optimiser step; returns the loss per example over all processes."""
        seed = self.seed * 1_000_003 + self.step
        weights = task_weights(self.names, self.accuracy, self.emphasis)
        drawn = draw_examples(self.prompts, self.tokenizer, weights, seed, self.step / self.num_steps)
        # Every process draws the same examples and takes its share, of like lengths for all.
        drawn.sort(key=_own_length)
        examples = drawn[dist.get_rank() :: dist.get_world_size()]
        names = [*self.names, COMPLETION]
        # Row 0 counts examples per task, row 1 the exact ones; the last column holds loss and tokens.
        counts = torch.zeros(2, len(names) + 1)
        for batch in make_passes(examples):
            with torch.autocast("cpu", torch.bfloat16):
                logits = answer_logits(self.model, batch)
            self.balance.count(batch.num_tokens, num_columns=batch.ids.shape[1], is_vision=batch.is_vision)
            loss = (functional.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
            loss = loss / EXAMPLES_PER_STEP
            loss.backward()
            columns = torch.tensor([names.index(name) for name in batch.task_names])
            counts[0].index_add_(0, columns, torch.ones(len(columns)))
            counts[1].index_add_(0, columns, exact_rows(logits.detach(), batch).float())
            counts[0, -1] += loss.detach()
        counts[1, -1] = sum(_own_length(example) for example in examples)
        rate = rate_factor(self.step, self.num_steps)
        self.optimizer.step(rate)
        self.balance.step(rate)
        sum_over_processes([counts])
        for place, name in enumerate(names):
            if seen := float(counts[0, place]):
                share = 1 - 0.98**seen
                self.accuracy[name] += share * (float(counts[1, place]) / seen - self.accuracy[name])
        self.step += 1
        self.num_tokens += int(counts[1, -1])
        return float(counts[0, -1])

    def evaluate(self, loss: float) -> None:
        """Measure on unseen items and keep a row of the training log."""
        accuracy = measure(self.model, self.prompts, self.names, num_items=100, seed=self.step)
        row = LogRow(step=self.step, tokens=self.num_tokens, seconds=self.seconds, loss=loss, accuracy=accuracy)
        self.history.append(row)
        shown = " ".join(f"{name} {share:.2f}" for name, share in accuracy.items())
        self.log(f"== step {self.step} unseen: {shown} mean {sum(accuracy.values()) / len(accuracy):.3f}")
        for line in self.balance.report():
            self.log(line)

    def save(self, path: Path) -> None:
        """Write a checkpoint, replacing the last one only when the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state(),
            "accuracy": self.accuracy,
            "step": self.step,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "history": self.history,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        state = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        self.accuracy = state["accuracy"]
        self.step, self.num_tokens, self.seconds = state["step"], state["num_tokens"], state["seconds"]
        self.history = state["history"]
