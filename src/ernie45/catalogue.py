"""The checkpoints ernie45 knows by name."""

from __future__ import annotations

import difflib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueEntry:
    """One checkpoint that loads by name: `name` is its Hub id, or "ernie45/…" when it is `built_in`."""

    name: str
    built_in: bool = False

    @property
    def short_name(self) -> str:
        """The name without its organisation, such as "ERNIE-4.5-0.3B-PT"."""
        return self.name.partition("/")[2]


CATALOGUE: tuple[CatalogueEntry, ...] = (
    CatalogueEntry(name="baidu/ERNIE-4.5-0.3B-PT"),
    CatalogueEntry(name="baidu/ERNIE-4.5-0.3B-Base-PT"),
    CatalogueEntry(name="ernie45/tiny-dense", built_in=True),
)

_BY_SPELLING = MappingProxyType(
    {spelling.lower(): entry for entry in CATALOGUE for spelling in (entry.name, entry.short_name)}
)


def find(name: str) -> CatalogueEntry | None:
    """Look a checkpoint up by its full or short name, in any case; None when it is not in the catalogue."""
    return _BY_SPELLING.get(name.strip().lower())


def suggest(name: str) -> tuple[str, ...]:
    """Full names of up to three entries spelt much like `name`, best first; empty when none comes close."""
    close = difflib.get_close_matches(name.strip().lower(), _BY_SPELLING, n=6, cutoff=0.75)
    return tuple(dict.fromkeys(_BY_SPELLING[spelling].name for spelling in close))[:3]


def did_you_mean(name: str) -> str:
    """The same as a hint: "did you mean 'baidu/ERNIE-4.5-0.3B-PT'?", or "" when none comes close."""
    close = suggest(name)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def built_in_folder(entry: CatalogueEntry) -> Path:
    """Where the files of a built-in checkpoint lie inside the installed package (not checked to exist)."""
    return Path(str(importlib.resources.files("ernie45") / "assets" / "tiny" / entry.short_name))
