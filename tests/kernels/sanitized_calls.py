"""A program that calls every kernel at odd sizes: `python -m tests.kernels.sanitized_calls LIBRARY` runs it on one
compiled with the address sanitizer, which ends it where memory is read or written that is nobody's. With a second
argument, "beyond", it does read such memory."""

from __future__ import annotations

import sys
import threading
from ctypes import addressof
from pathlib import Path
from typing import Any

import torch

from ernie45.kernels import library
from ernie45.kernels.library import instruction_sets, set_threads, use_instruction_set
from ernie45.kernels.native import Kernels, kernels
from ernie45.kernels.panels import PanelMemory
from tests.backends.native_models import SHAPES, build, prefill, random_ids
from tests.kernels.panel_matrices import DTYPES, SCHEMES, Bank, Matrix, Mlp, Norm, Router, choice, random


def by_itself(memory: PanelMemory, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Instead of a part of a piece, so that the end of each tensor is watched."""
    return torch.empty(shape, dtype=dtype)


def call_all(native: Kernels, scheme: str, dtype: torch.dtype, hidden: int, num_tokens: int) -> None:
    matrix, norm = Matrix.draw(scheme, 65, hidden, bias=True), Norm(hidden)
    bank = Bank([Mlp.draw((scheme, scheme), hidden, 64, bias=True, seed=i) for i in range(5)])
    router, x = Router(5, hidden, 3, correction=True), random(num_tokens, hidden).to(dtype)
    native.linear(matrix.linear.struct, x)
    native.head(norm.struct, matrix.linear.struct, x)
    native.mlp(norm.struct, bank.experts[0].struct, x)
    native.route(norm.struct, router.struct, x)
    for shared in (None, bank.experts[1].struct):
        chosen, shares = choice(num_tokens, 5, 3)
        native.experts(norm.struct, bank.table, shared, chosen, shares, x)
        outputs = torch.empty(num_tokens * (3 + (shared is not None)), hidden)
        first = chosen[-1].tolist()
        later = sorted(set(chosen.flatten().tolist()).difference(first))
        for beside, numbers in ((shared, first), (None, later)):
            if numbers:
                native.experts(norm.struct, bank.table, beside, chosen, shares, x, numbers, outputs)
        native.add_outputs(outputs, has_shared=shared is not None, chosen=chosen, shares=shares, x=x)
    if scheme != "int4":
        native.lookup(matrix.linear.struct, torch.tensor([0, 64, 33]), dtype)


def make_panels_alone() -> None:
    """On a thread of its own, beside others' calls: of rows and groups that fill neither a panel nor a dword."""

    def make(num_rows: int, num_groups: int) -> None:
        library.work_alone()
        for scheme in SCHEMES:
            Matrix.draw(scheme, num_rows, 32 * num_groups, seed=num_rows)

    shapes = ((1, 1), (63, 2), (64, 3), (65, 4), (130, 5), (200, 9))
    threads = [threading.Thread(target=make, args=shape) for shape in shapes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_models() -> None:
    for shape in (SHAPES["experts"], SHAPES["biases"], SHAPES["heads of 96"]):
        for preset in SCHEMES:
            for kv_dtype in ("auto", "int8"):
                model: Any = build(shape, preset, kv_dtype=kv_dtype)
                prefill(model, random_ids(45), (1, 2, 9, 45))


def read_beyond(native: Kernels) -> None:
    matrix, x = Matrix.draw("int8", 65, 96), random(1, 96)
    native._call("linear", addressof(matrix.linear.struct), x.data_ptr() + 4, 1, torch.empty(65).data_ptr(), 0)


def main() -> None:
    library.LIBRARY_FILE = Path(sys.argv[1])  # type: ignore[misc]
    PanelMemory.take = by_itself  # type: ignore[method-assign,assignment]
    native = kernels()
    assert native is not None, library.why_not()
    if sys.argv[2:] == ["beyond"]:
        read_beyond(native)
        return
    set_threads(3)
    for name in instruction_sets():
        use_instruction_set(name)
        for scheme in SCHEMES:
            for dtype in DTYPES:
                for hidden, num_tokens in ((32, 1), (96, 7), (160, 98)):
                    call_all(native, scheme, dtype, hidden, num_tokens)
            # As many panels as two or three of them a task take.
            norm, wide = Norm(1056), Mlp.draw((scheme, scheme), 1056, 3136, bias=True)
            native.mlp(norm.struct, wide.struct, random(2, 1056))
        run_models()
    make_panels_alone()


if __name__ == "__main__":
    main()
