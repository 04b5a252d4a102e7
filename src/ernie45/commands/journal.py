"""What a conversion has done so far, kept in the folder it writes, so that a later run can go on.

The rule that makes it safe: bytes are brought to the disk before the journal speaks of them, and the journal is
replaced as a whole. It is the first file in the folder, and the last to leave it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from ernie45.checkpoint.headers import read_json
from ernie45.checkpoint.write import START, Mark, write_file
from ernie45.errors import CorruptFileError, InvalidRequestError

JOURNAL_FILE = ".ernie45-convert.json"


@final
class Journal:
    """How far each file is, for one plan."""

    def __init__(self, folder: Path, plan: str, marks: dict[str, Mark]) -> None:
        self._folder = folder
        self._plan = plan
        self._marks = marks

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk, in all files."""
        return sum(mark.num_bytes for mark in self._marks.values())

    def mark(self, file_name: str) -> Mark:
        """How far a file is."""
        return self._marks.get(file_name, START)

    def set_mark(self, file_name: str, mark: Mark) -> None:
        """Note how far a file is, which must be on the disk already."""
        self._marks[file_name] = mark
        self.save()

    def save(self) -> None:
        marks = {name: {"num_bytes": mark.num_bytes, "sha256": mark.sha256} for name, mark in self._marks.items()}
        content = json.dumps({"plan": self._plan, "files": marks}, indent=2) + "\n"
        write_file(self._folder / JOURNAL_FILE, content.encode())

    def remove(self) -> None:
        (self._folder / JOURNAL_FILE).unlink()


def open_journal(folder: Path, plan: str) -> Journal | None:
    """The journal in a folder; None where there is none.

    Raises:
        InvalidRequestError: it belongs to another plan.
        CorruptFileError: it is not what was written.
    """
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("plan") != plan:
        raise InvalidRequestError(
            f"{folder} holds an unfinished conversion of another checkpoint, or with another preset or into files of "
            "another size",
            hint="go on with the source and the options it was begun with, or delete the folder",
        )
    return Journal(folder, plan, {name: _mark(path, entry) for name, entry in content.get("files", {}).items()})


def _mark(path: Path, entry: Any) -> Mark:
    try:
        return Mark(num_bytes=int(entry["num_bytes"]), sha256=str(entry["sha256"]))
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path} is damaged", hint="delete the unfinished folder and start again") from error
