"""Reading stored tensors straight into place."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import final

import torch

from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo
from ernie45.checkpoint.progress import Advance
from ernie45.errors import CorruptFileError, TensorError

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


def find_tensor(index: CheckpointIndex, name: str, out: torch.Tensor) -> TensorInfo:
    """Look up the stored tensor `name` and check that it fits `out`: its shape, and a dtype that converts.

    Raises TensorError.
    """
    info = index.tensors.get(name)
    if info is None:
        close = difflib.get_close_matches(name, index.tensors, n=1)
        raise TensorError(
            f"{index.folder} has no tensor {name!r}",
            hint=f"the closest name is {close[0]!r}" if close else "config.json asks for other weights",
        )
    if tuple(out.shape) != info.shape:
        raise TensorError(
            f"tensor {name!r} is stored with shape {list(info.shape)}, but the model needs {list(out.shape)}",
            hint="config.json and the weight files do not belong together: fetch both again",
        )
    stored = TORCH_DTYPES[info.dtype]
    if out.dtype != stored and not (out.dtype.is_floating_point and stored.is_floating_point):
        raise TensorError(
            f"tensor {name!r} is stored as {info.dtype} and cannot be read as {_dtype_name(out.dtype)}",
            hint="only floating-point dtypes convert into one another",
        )
    return info


@final
class TensorReader:
    """Reads tensors of a checkpoint into memory the caller has laid out, and keeps count of which were read.

    Files are read, not mapped, so that their pages never count as this process's memory. Safe to use from
    several threads. `advance`, if given, is told the bytes read, in steps of at most `BLOCK_BYTES`.
    """

    def __init__(self, index: CheckpointIndex, *, advance: Advance | None = None) -> None:
        self._index = index
        self._advance = advance
        self._read: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._index.tensors

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read the stored tensor `name` into `out`, which has its shape; any strides, any device.

        A contiguous CPU tensor of the stored dtype is filled in place. Anything else goes through a staging
        buffer of at most `BLOCK_BYTES`; floating-point dtypes convert, others must match.
        Raises TensorError for an unknown name, another shape or a dtype that does not convert, and
        CorruptFileError when the file has shrunk since its header was read.
        """
        info = find_tensor(self._index, name, out)
        stored = TORCH_DTYPES[info.dtype]
        out = out.detach()
        if out.device.type == "cpu" and out.dtype == stored and out.is_contiguous():
            self._read_bytes(info, 0, _bytes_of(out))
        else:
            self._read_staged(info, out, stored)
        self._read.add(name)

    def unread(self) -> tuple[str, ...]:
        """Names of the stored tensors that were not read so far, in file order."""
        return tuple(name for name in self._index.tensors if name not in self._read)

    def _read_staged(self, info: TensorInfo, out: torch.Tensor, stored: torch.dtype) -> None:
        block_elements = BLOCK_BYTES // stored.itemsize
        staging = torch.empty(min(out.numel(), block_elements), dtype=stored, device="cpu")
        offset = 0
        for block in _blocks(out, block_elements):
            part = staging[: block.numel()]
            self._read_bytes(info, offset, _bytes_of(part))
            block.copy_(part.view(block.shape))
            offset += part.numel() * stored.itemsize

    def _read_bytes(self, info: TensorInfo, offset: int, target: memoryview) -> None:
        done = 0
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start + offset)
            while done < len(target):
                num_bytes = file.readinto(target[done : done + BLOCK_BYTES])
                if not num_bytes:
                    raise CorruptFileError(
                        f"{info.file} is cut short inside tensor {info.name!r}: expected "
                        f"{info.start + info.num_bytes} bytes or more, it has {info.file.stat().st_size}",
                        hint="the file changed while it was being read: fetch it again",
                    )
                done += num_bytes
                if self._advance is not None:
                    self._advance(num_bytes)


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


def _bytes_of(contiguous: torch.Tensor) -> memoryview:
    return contiguous.view(-1).view(torch.uint8).numpy().data


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
