"""Reading stored tensors straight into place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from types import MappingProxyType
from typing import Protocol, final, runtime_checkable

import torch

from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo
from ernie45.checkpoint.layouts import Layout, Piece
from ernie45.checkpoint.progress import Advance
from ernie45.checkpoint.range_reads import ByteSource, RangeReader
from ernie45.errors import CorruptFileError, TensorError
from ernie45.quantization.panels import StoredMatrix

BLOCK_BYTES = 16 << 20
"""Most bytes read at a time, and the size of the staging buffer: enough for full speed, and little memory."""

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "U16": torch.bfloat16,  # numpy has no bfloat16, so Paddle's files carry its bits as U16
        "I16": torch.int16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "F32": torch.float32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F64": torch.float64,
    }
)

_COMPARED_BYTES = 1 << 20
_SUMMABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class TensorSource(Protocol):
    """Where tensors come from, by their -PT names and in torch's orientation, however the files lay them out."""

    def __contains__(self, name: object) -> bool: ...

    def read_into(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        """Fill `out` with tensors stacked along their first axis; `parts` maps each name to its rows.

        Raises TensorError for one that is missing or has another shape.
        """


@runtime_checkable
class PackedSource(TensorSource, Protocol):
    """A source that has matrices quantised already."""

    def read_packed(
        self, parts: Mapping[str, int], in_features: int, device: torch.device
    ) -> Sequence[StoredMatrix] | None:
        """The matrices of these -PT module names (without ".weight") and output widths, stacked where they can be, on
        `device`; None where they are not stored quantised.

        Raises TensorError where one is missing, or its shape or dtype does not fit.
        """
        ...


@runtime_checkable
class BlockSource(TensorSource, Protocol):
    """A source that can hand out a matrix piece by piece, so that the whole of it is never in memory."""

    def read_blocks(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """The rows of a matrix in order, some at a time, on the CPU and in the dtype they are stored in.

        A block is overwritten by the next. Raises as `read_into` does.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRead:
    """One stored tensor to read, and where its values go.

    `targets` pairs a stretch of the stored last axis with the rows of memory it fills; a single stretch None is the
    whole tensor as it stands. `transposed`: the stored axes are the other way round.
    """

    info: TensorInfo
    transposed: bool
    targets: tuple[tuple[slice | None, torch.Tensor], ...]


def find_reads(index: CheckpointIndex, layout: Layout, out: torch.Tensor, parts: Mapping[str, int]) -> list[StoredRead]:
    """Which stored tensors fill `out`: the -PT tensors of `parts`, name to rows, stacked along the first axis.

    Raises TensorError where a tensor is missing, or its shape or dtype does not fit.
    """
    reads: dict[str, StoredRead] = {}
    first = 0
    for name, num_rows in parts.items():
        piece = layout.locate(name)
        info = index.tensors.get(piece.key)
        if info is None:
            raise _missing(index, name, piece.key)
        rows = out[first : first + num_rows]
        _check_fit(info, piece, rows)
        stretches = _stretches(piece, rows)
        if piece.key in reads:
            stretches = reads[piece.key].targets + stretches
        reads[piece.key] = StoredRead(info=info, transposed=piece.transposed, targets=stretches)
        first += num_rows
    return list(reads.values())


def _stretches(piece: Piece, rows: torch.Tensor) -> tuple[tuple[slice | None, torch.Tensor], ...]:
    if piece.columns is None:
        return ((None, rows),)
    ends = list(accumulate(column.stop - column.start for column in piece.columns))
    return tuple(
        (column, rows[end - (column.stop - column.start) : end])
        for column, end in zip(piece.columns, ends, strict=True)
    )


def _missing(index: CheckpointIndex, name: str, key: str) -> TensorError:
    close = difflib.get_close_matches(key, islice(index.tensors, 20_000), n=1)  # a second's work
    return TensorError(
        f"{index.folder} has no tensor {key!r}" + (f" (for {name!r})" if key != name else ""),
        hint=f"the closest name is {close[0]!r}" if close else "config.json asks for other weights",
    )


def _check_fit(info: TensorInfo, piece: Piece, rows: torch.Tensor) -> None:
    wanted = [piece.stored_columns or rows.shape[0], *rows.shape[1:]]
    if piece.transposed:
        wanted.reverse()
    if tuple(wanted) != info.shape:
        raise TensorError(
            f"tensor {info.name!r} is stored with shape {list(info.shape)}, but the model needs {wanted}",
            hint="config.json and the weight files do not belong together: fetch both again",
        )
    stored = TORCH_DTYPES[info.dtype]
    if rows.dtype != stored and not (rows.dtype.is_floating_point and stored.is_floating_point):
        raise TensorError(
            f"tensor {info.name!r} is stored as {info.dtype} and cannot be read as {_dtype_name(rows.dtype)}",
            hint="only floating-point dtypes convert into one another",
        )


@final
class TensorReader:
    """Reads tensors of a checkpoint into memory the caller has laid out, by their -PT names.

    Files are read, not mapped, so that their pages never count as this process's memory. Safe to use from
    several threads, unless `ranges` is not. `advance`, if given, is told the bytes read, on several threads; but
    nothing where `ranges` reads them.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        layout: Layout,
        *,
        advance: Advance | None = None,
        ranges: ByteSource | None = None,
    ) -> None:
        self._index = index
        self._layout = layout
        self._ranges = RangeReader(advance) if ranges is None else ranges

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._layout.locate(name).key in self._index.tensors

    def read_into(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        """Fill `out` with tensors stacked along their first axis: `parts` says which, by -PT name, and their rows.

        `out` may have any strides and lie on any device. A contiguous CPU tensor stored just so is filled in place.
        Anything else goes through a staging buffer of at most `BLOCK_BYTES`; floating-point dtypes convert, others
        must match.
        Raises TensorError for an unknown name, another shape, a dtype that does not convert or a value that is not
        finite, and CorruptFileError when the file has shrunk since its header was read.
        """
        for read in find_reads(self._index, self._layout, out.detach(), parts):
            stretch, target = read.targets[0]
            stored = TORCH_DTYPES[read.info.dtype]
            if stretch is None and not read.transposed:
                if target.device.type == "cpu" and target.dtype == stored and target.is_contiguous():
                    self._read_in_place(read.info, target)
                else:
                    self._read_staged(read.info, target, stored)
            else:
                self._read_columns(read, stored)

    def read_blocks(self, name: str, shape: tuple[int, int]) -> Iterator[torch.Tensor]:
        """The rows of a matrix in order, at most `BLOCK_BYTES` at a time, in a buffer that is used for all of them; of
        a matrix that is stored the other way round, all rows at once. Raises as `read_into` does."""
        num_rows, num_columns = shape
        read = find_reads(self._index, self._layout, torch.empty(shape, device="meta"), {name: num_rows})[0]
        stored = TORCH_DTYPES[read.info.dtype]
        if read.transposed or read.targets[0][0] is not None:
            whole = torch.empty(shape, dtype=stored)
            self.read_into(whole, {name: num_rows})
            yield whole
            return
        row_bytes = num_columns * stored.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        staging = torch.empty((min(num_rows, step), num_columns), dtype=stored, device="cpu")
        for first in range(0, num_rows, step):
            block = staging[: min(step, num_rows - first)]
            self._read_bytes(read.info, first * row_bytes, bytes_of(block))
            _check_finite(block, read.info, wanted=stored)
            yield block

    def _read_in_place(self, info: TensorInfo, out: torch.Tensor) -> None:
        flat = out.view(-1)
        step = BLOCK_BYTES // flat.element_size()
        for first in range(0, flat.numel(), step):
            block = flat[first : first + step]
            self._read_bytes(info, first * flat.element_size(), bytes_of(block))
            _check_finite(block, info, wanted=out.dtype)

    def _read_staged(self, info: TensorInfo, out: torch.Tensor, stored: torch.dtype) -> None:
        block_elements = BLOCK_BYTES // stored.itemsize
        staging = torch.empty(min(out.numel(), block_elements), dtype=stored, device="cpu")
        offset = 0
        for block in _blocks(out, block_elements):
            part = staging[: block.numel()]
            self._read_bytes(info, offset, bytes_of(part))
            _check_finite(part, info, wanted=out.dtype)
            block.copy_(part.view(block.shape))
            offset += part.numel() * stored.itemsize

    def _read_columns(self, read: StoredRead, stored: torch.dtype) -> None:
        """Read a matrix by blocks of its rows (or a vector at once) and hand each target its columns."""
        info = read.info
        num_columns = info.shape[-1]
        num_rows = math.prod(info.shape[:-1])
        block_rows = max(1, BLOCK_BYTES // (num_columns * stored.itemsize))
        staging = torch.empty((min(num_rows, block_rows), num_columns), dtype=stored, device="cpu")
        for first in range(0, num_rows, block_rows):
            block = staging[: min(block_rows, num_rows - first)]
            self._read_bytes(info, first * num_columns * stored.itemsize, bytes_of(block))
            _check_finite(block, info, wanted=read.targets[0][1].dtype)
            for stretch, target in read.targets:
                values = block if stretch is None else block[:, stretch]
                if read.transposed:
                    target[:, first : first + len(block)].copy_(values.T)
                else:
                    target.copy_(values.reshape(target.shape))

    def _read_bytes(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        if self._ranges.read(info.file, info.start + offset, target) < len(target):
            raise CorruptFileError(
                f"{info.file} is cut short inside tensor {info.name!r}: expected "
                f"{info.start + info.num_bytes} bytes or more, it has {info.file.stat().st_size}",
                hint="the file changed while it was being read: fetch it again",
            )


def hold_the_same(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two stored tensors agree in shape, dtype and every bit; the first difference ends the reading."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.num_bytes
        while left:
            step = min(left, _COMPARED_BYTES)
            if one.read(step) != other.read(step):
                return False
            left -= step
    return True


def _blocks(out: torch.Tensor, max_elements: int) -> Iterator[torch.Tensor]:
    """Cut a tensor into views of at most `max_elements`, in row-major order."""
    if out.numel() <= max_elements:
        yield out
        return
    rows = max_elements // (out.numel() // out.shape[0])
    if rows:
        for start in range(0, out.shape[0], rows):
            yield out[start : start + rows]
    else:
        for row in out:
            yield from _blocks(row, max_elements)


def _check_finite(block: torch.Tensor, info: TensorInfo, *, wanted: torch.dtype) -> None:
    if wanted == torch.float16 or block.dtype == torch.float64:  # what is too large becomes infinite on the way
        block = block.to(wanted)
    # A sum is not finite if a term is not: the cheapest look. Where it only overflowed, the second look finds nothing.
    if block.dtype in _SUMMABLE and not math.isfinite(block.sum()):
        num_bad = int((~block.float().isfinite()).sum())
        if num_bad:
            raise TensorError(
                f"tensor {info.name!r} in {info.file} holds {num_bad} values that are not finite (NaN or infinity) "
                f"as {_dtype_name(block.dtype)}",
                hint="the weights are damaged, or their training diverged: fetch the file again or use another release",
            )


def bytes_of(contiguous: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return contiguous.view(-1).view(torch.uint8).numpy().data


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
