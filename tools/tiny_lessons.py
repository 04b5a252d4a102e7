"""Lessons in seeing for the vision tower: what each token of a picture shows, told to it directly.

The answers of the tasks teach colours and places in time, but shapes and motion too slowly. Once, before step
`LESSONS_FROM` of the training, the tower and the resampler are therefore trained alone on crowded pictures and clips of
two frames. A head of their own reads every token: the shape and colour of the figure whose centre lies there, and the
way it moves. The head is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

import torch
import torch.distributed as dist
from tiny_media import SETTINGS, normalize
from tiny_optimizer import TinyOptimizer, sum_over_processes
from torch import Tensor, nn
from torch.nn import functional
from transformers import Ernie4_5_VLMoeForConditionalGeneration

from ernie45.testing.task_scenes import BACKGROUNDS, COLOURS, SHAPES, Figure, Scene, backgrounds_for
from ernie45.types.media import Media
from ernie45.vision import prepare_image
from ernie45.vision.patches import prepare_frames

LESSONS_FROM: Final = 1200
NUM_LESSONS: Final = 1000
PICTURES, CLIPS = 20, 6  # for each process and lesson
DIRECTIONS: Final = ((-1, 0), (1, 0), (0, -1), (0, 1))
NUM_CLASSES: Final = (len(SHAPES) + 1, len(COLOURS) + 1, len(DIRECTIONS) + 1)  # the last of each: no figure
EMPTY_WEIGHT: Final = 0.1


class Seeing(nn.Module):
    """The tower and the resampler of a model, and the head of the lessons."""

    def __init__(self, model: Ernie4_5_VLMoeForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.resampler = model.model.resampler_model
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(NUM_CLASSES))

    def forward(self, drawn: list[tuple[Media, Tensor]]) -> tuple[Tensor, Tensor]:
        """The loss over the labels [num_tokens, 3] of pictures or clips, and the share of figures guessed right [3]."""
        grid = torch.tensor([media.grid for media, _ in drawn])
        labels = torch.cat([labels for _, labels in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.tower(normalize(torch.cat([media.patches for media, _ in drawn])), grid)
            logits = self.head(self.resampler(seen.last_hidden_state, grid)).float().split(NUM_CLASSES, dim=-1)
        shown = labels[:, 0] < len(SHAPES)
        weights = torch.where(shown, 1.0, EMPTY_WEIGHT)
        losses = [functional.cross_entropy(part, labels[:, i], reduction="none") for i, part in enumerate(logits)]
        guesses = torch.stack([part.argmax(-1) for part in logits], dim=-1)
        return (sum(losses) * weights).sum() / weights.sum(), (guesses == labels)[shown].float().mean(0)


def teach(model: Ernie4_5_VLMoeForConditionalGeneration, *, seed: int, log: Callable[[str], None]) -> None:
    """Give all lessons; the processes draw different scenes and share their gradients."""
    seeing = Seeing(model)
    optimizer = TinyOptimizer(seeing)
    rng = random.Random(f"lessons {seed} {dist.get_rank()}")
    shares = torch.zeros(4)
    for lesson in range(NUM_LESSONS):
        for is_clip, number in ((False, PICTURES), (True, CLIPS)):
            loss, right = seeing([_draw_labelled(rng, is_clip=is_clip) for _ in range(number)])
            (loss / dist.get_world_size()).backward()
            shares += torch.cat([right[:2], torch.zeros(2)]) if not is_clip else torch.cat([torch.zeros(2), right[1:]])
        optimizer.step(min(1.0, (lesson + 1) / 20, 2 * (1 - lesson / NUM_LESSONS)))
        if (lesson + 1) % 25 == 0:
            sum_over_processes([shares])
            shape, colour, _, way = (shares / 25 / dist.get_world_size()).tolist()
            log(f"lesson {lesson + 1}: shape {shape:.3f} colour {colour:.3f} direction {way:.3f}")
            shares.zero_()
    for parameter in model.parameters():
        parameter.grad = None


def _draw_labelled(rng: random.Random, *, is_clip: bool) -> tuple[Media, Tensor]:
    """A picture, or a clip of two frames, with the shape, colour and direction that each of its tokens shows."""
    width, height = (rng.randint(84, 112) if is_clip else rng.randint(56, 126) for _ in range(2))
    background = rng.choice([*BACKGROUNDS])
    colours = [name for name in COLOURS if background in backgrounds_for([name])]
    across = 3 if min(width, height) > 80 and rng.random() < 0.7 else 2
    if rng.random() < 0.15:
        across = 1
    figures, moved, directions = [], [], []
    for cell in range(across**2):
        if across > 1 and rng.random() < 0.15:
            continue
        row, column = divmod(cell, across)
        short = min(width, height)
        radius = max(8.0, short * min(0.32, rng.uniform(0.33, 0.48) / across))
        x, y = ((place + 0.5) / across + rng.uniform(-0.04, 0.04) for place in (column, row))
        colour, direction = rng.choice(colours), rng.randrange(4) if is_clip else len(DIRECTIONS)
        red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[colour][1])
        shape = rng.choice([*SHAPES])
        figures.append(Figure(shape=shape, colour=colour, rgb=(red, green, blue), x=x, y=y, radius=radius))
        directions.append(direction)
        if is_clip:
            way, length = DIRECTIONS[direction], rng.uniform(0.05, 0.2)
            x, y = x + length * way[0], y + length * way[1]
            moved.append(Figure(shape=shape, colour=colour, rgb=(red, green, blue), x=x, y=y, radius=radius))
    scenes = [Scene(width=width, height=height, background=background, figures=tuple(figures))]
    if is_clip:
        scenes.append(Scene(width=width, height=height, background=background, figures=tuple(moved)))
    frames = [scene.draw() for scene in scenes]
    media = prepare_frames(frames, SETTINGS) if is_clip else prepare_image(frames[0], SETTINGS)
    rows, columns = media.grid[1] // SETTINGS.merge_size, media.grid[2] // SETTINGS.merge_size
    labels = torch.tensor(NUM_CLASSES).sub(1).repeat(rows, columns, 1)
    for figure, direction in zip(figures, directions, strict=True):
        names = [[*SHAPES].index(figure.shape), [*COLOURS].index(figure.colour), direction]
        labels[int(figure.y * rows), int(figure.x * columns)] = torch.tensor(names)
    return media, labels.flatten(0, 1)
