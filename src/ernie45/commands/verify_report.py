"""What `ernie45 verify` found out, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorGroup:
    """Stored tensors whose names differ in numbers alone, with the same dtype, shape and fate ("read, transposed",
    "ignored: …", "unexpected")."""

    pattern: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    fate: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Our float32 logits beside transformers', at every position of a short prompt of "text", or with "a picture".
    `through` tells how transformers came to read the folder."""

    of: str
    num_positions: int
    max_difference: float
    num_equal_ids: int
    through: str

    @property
    def is_close(self) -> bool:
        return self.max_difference <= LOGITS_TOLERANCE and self.num_equal_ids == self.num_positions

    def __str__(self) -> str:
        verdict = "as close as promised" if self.is_close else "FARTHER APART THAN PROMISED"
        return (
            f"{verdict}: largest difference {self.max_difference:.2e} (promised: {LOGITS_TOLERANCE:.0e}), "
            f"greedy ids equal at {self.num_equal_ids} of {self.num_positions} positions, float32, {self.through}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """One checkpoint folder, examined. `str()` gives it as Markdown, without paths of this machine.

    `files` maps names to bytes. `layout` and `layout_reason` are "" where it could not be told. `dtypes` maps each
    stored dtype to its tensors and bytes. `parameters` compares the headers with config.json in words. `comparisons`
    are of a text, and of a picture where the model sees; `comparison_note` tells why there are none. `problems` are
    what would keep the folder from loading, or from answering as transformers does; where there are none, `is_good`.
    """

    folder: str
    files: Mapping[str, int]
    model: str
    layout: str
    layout_reason: str
    groups: tuple[TensorGroup, ...]
    dtypes: Mapping[str, tuple[int, int]]
    parameters: str
    unknown_config_keys: tuple[str, ...]
    tokenizer: str
    comparisons: tuple[Comparison, ...]
    comparison_note: str
    problems: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def is_good(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        num_tensors = sum(group.count for group in self.groups)
        dtypes = ", ".join(f"{name} {count}, {num:,} bytes" for name, (count, num) in self.dtypes.items())
        lines = [
            f"## ernie45 verify: `{self.folder}`",
            "",
            "**Good.**" if self.is_good else f"**{len(self.problems)} problem(s):**",
            *(f"- {problem}" for problem in self.problems),
            "",
            f"- model: {self.model or 'unknown'}",
            f"- layout: {f'{self.layout} ({self.layout_reason})' if self.layout else 'unknown'}",
            f"- tensors: {num_tensors}",
            f"- parameters: {self.parameters or 'unknown'}",
            f"- tensors by stored dtype: {dtypes or 'unknown'}",
            f"- keys of config.json that ernie45 does not know: {', '.join(self.unknown_config_keys) or 'none'}",
            f"- tokenizer: {self.tokenizer}",
            *(f"- logits of {comparison.of} beside transformers: {comparison}" for comparison in self.comparisons),
            *([f"- logits beside transformers: {self.comparison_note}"] if self.comparison_note else []),
            f"- versions: {', '.join(f'{name} {version}' for name, version in self.versions.items())}",
            "",
            "| tensors | count | dtype | shape | fate |",
            "| --- | --- | --- | --- | --- |",
            *(_group_line(group) for group in self.groups),
            "",
            "| file | bytes |",
            "| --- | --- |",
            *(f"| {name} | {num_bytes:,} |" for name, num_bytes in self.files.items()),
        ]
        return "\n".join(lines)


def _group_line(group: TensorGroup) -> str:
    return f"| `{group.pattern}` | {group.count} | {group.dtype} | {list(group.shape)} | {group.fate} |"
