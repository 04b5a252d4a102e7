"""The documentation has every page it promises, and describes every folder of the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

REPO_ROOT = Path(__file__).resolve().parents[2]
DOCS = REPO_ROOT / "docs"


def test_navigation_and_pages_are_the_same() -> None:
    navigation = yaml.safe_load((REPO_ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(_pages_of(navigation)) == pages


def test_the_architecture_page_names_every_part_of_the_source() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    package = REPO_ROOT / "src" / "ernie45"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    modules = {path.stem for path in package.glob("*.py") if path.stem != "__init__"}
    assert sorted(name for name in folders | modules if f"`{name}`" not in text) == []


def _pages_of(navigation: object) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    elif isinstance(navigation, dict):
        for below in navigation.values():
            yield from _pages_of(below)
    elif isinstance(navigation, list):
        for below in navigation:
            yield from _pages_of(below)
