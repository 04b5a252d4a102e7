"""What `ernie45 quality` measured, and how it is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from ernie45.commands.text_table import text_table


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetQuality:
    """One way to load a model, and what it is worth.

    Attributes:
        preset: the quantisation, `kv_dtype` how keys and values are kept.
        weight_bytes: of all weights with their scales; `bytes_per_parameter` of one.
        perplexity: of the scored texts, over all their tokens.
        agreement: at which share of the positions the most likely token is the reference's.
        logits_error: root of the squared difference to the reference's logits over their squares.
        num_right: how many replies were exactly right, by task.
    """

    preset: str
    kv_dtype: str
    weight_bytes: int
    bytes_per_parameter: float
    perplexity: float
    agreement: float
    logits_error: float
    num_right: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReport:
    """A model by the ways to load it. The first of `rows` is what the others are compared with. `str()` gives tables.

    Attributes:
        texts: what was scored, in words; `num_tokens` of them have a log-probability.
        num_compared: at how many positions logits were compared.
        num_items: how many questions of each task were asked; 0 where there were no tasks.
        notes: what could not be measured, and why.
    """

    model: str
    texts: str
    num_tokens: int
    num_compared: int
    num_items: int
    seed: int
    rows: tuple[PresetQuality, ...]
    notes: tuple[str, ...]

    @property
    def reference(self) -> PresetQuality:
        return self.rows[0]

    def accuracy(self, row: PresetQuality) -> float:
        """Share of right replies over all tasks."""
        return sum(row.num_right.values()) / (self.num_items * len(row.num_right))

    def json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        tables = [text_table([_HEADER, *map(_row, self.rows)])]
        if self.num_items:
            tables.append(self._task_table())
        lines = [
            f"{self.model}, compared with {self.reference.preset!r} "
            f"(keys and values: {self.reference.kv_dtype}); scored: {self.texts}, {self.num_tokens:,} tokens",
            *(f"note: {note}" for note in self.notes),
        ]
        if self.num_compared < self.num_tokens:
            lines.append(f"note: LOGITS ERROR is of the first {self.num_compared:,} tokens")
        return "\n\n".join(["\n".join(lines), *tables])

    def _task_table(self) -> str:
        names = [f"{row.preset}, kv {row.kv_dtype}" if row.kv_dtype != "auto" else row.preset for row in self.rows]
        lines = [
            [task, *(f"{100 * row.num_right[task] / self.num_items:.1f}" for row in self.rows)]
            for task in self.reference.num_right
        ]
        overall = [f"{100 * self.accuracy(row):.2f}" for row in self.rows]
        return text_table([["RIGHT REPLIES, %", *names], *lines, ["all", *overall]])


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixQuality:
    """Matrices of one kind in one scheme: relative root-mean-square errors of the weights, and of their product with
    random inputs beside the bf16 product; `bits` per weight, scales included."""

    kind: str
    scheme: str
    num_matrices: int
    bits: float
    weight_error: float
    product_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayersReport:
    """Single matrices of a checkpoint by kind and scheme, "all" kinds together last. `str()` gives tables."""

    folder: str
    layers: tuple[int, ...]
    rows: tuple[MatrixQuality, ...]
    notes: tuple[str, ...]

    def json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def __str__(self) -> str:
        kinds = {row.kind: row.num_matrices for row in self.rows}
        schemes = list(dict.fromkeys(row.scheme for row in self.rows))
        cells = {(row.kind, row.scheme): row for row in self.rows}

        def table(title: str, show: Callable[[MatrixQuality], str]) -> str:
            lines = [
                [
                    kind,
                    str(count),
                    *(show(cells[kind, scheme]) if (kind, scheme) in cells else "-" for scheme in schemes),
                ]
                for kind, count in kinds.items()
            ]
            return text_table([[title, "MATRICES", *schemes], *lines])

        head = [f"{self.folder}, layers {', '.join(map(str, self.layers))}", *(f"note: {note}" for note in self.notes)]
        return "\n\n".join(
            [
                "\n".join(head),
                table("BITS A WEIGHT", lambda row: f"{row.bits:.2f}"),
                table("WEIGHT ERROR", lambda row: f"{row.weight_error:.2%}"),
                table("PRODUCT ERROR", lambda row: f"{row.product_error:.2%}"),
            ]
        )


_HEADER = ["PRESET", "KV", "WEIGHTS, MB", "BYTES/PARAM", "PERPLEXITY", "SAME TOKEN", "LOGITS ERROR"]


def _row(row: PresetQuality) -> list[str]:
    return [
        row.preset,
        row.kv_dtype,
        f"{row.weight_bytes / 1e6:,.2f}",
        f"{row.bytes_per_parameter:.3f}",
        f"{row.perplexity:.4f}",
        f"{row.agreement:.2%}",
        f"{row.logits_error:.2%}",
    ]
