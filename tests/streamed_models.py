"""Models whose routed experts are read from disk although they would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ernie45 import ErnieModel, dry_build
from ernie45.catalogue import built_in_folder, find
from ernie45.memory.planner import make_plan
from ernie45.types.streaming import ExpertSlots


def tiny(name: str) -> Path:
    """The folder of a built-in model."""
    entry = find(name)
    assert entry is not None
    return built_in_folder(entry)


@contextmanager
def streaming(slots: ExpertSlots | None) -> Iterator[None]:
    """Models that are loaded inside hold so many experts; None leaves them as they are."""
    planned = make_plan if slots is None else lambda request: replace(make_plan(request), expert_slots=slots)
    with patch.object(dry_build, "make_plan", planned):
        yield


def open_model(source: Path | str, slots: ExpertSlots | int | None, **options: Any) -> ErnieModel:
    """With so many experts of each bank in memory; all that there are with None, which needs no reading."""
    held = ExpertSlots(text=slots, vision=slots) if isinstance(slots, int) else slots
    asked: dict[str, Any] = {"context_tokens": 64, "max_batch": 1, "quantization": "none", **options}
    with streaming(held):
        return ErnieModel.from_pretrained(source, device="cpu", progress=False, **asked)
