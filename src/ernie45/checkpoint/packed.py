"""Reading our own packed format: the matrices are mapped from the files, or lie in what was staged, and not copied.

The format: docs/packed-format.md.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from ernie45.checkpoint.headers import CheckpointIndex
from ernie45.checkpoint.packed_config import matrix_scheme
from ernie45.checkpoint.progress import Advance
from ernie45.checkpoint.read import TORCH_DTYPES, TensorSource
from ernie45.checkpoint.staged_reads import StagedReader
from ernie45.errors import CorruptFileError, TensorError
from ernie45.presets import INT4_GROUP, QuantPreset
from ernie45.quantization.packed import PackedInt4, PackedInt8
from ernie45.quantization.panels import PANEL_ROWS, PanelInt4, StoredMatrix, panel_shape

_FUSED: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
_LOOKED_UP = ("model.embed_tokens", "lm_head")  # 8 bits only
_SAVE_AGAIN = "the files are damaged, or do not belong to config.json: save or fetch the folder again"


def packed_name(modules: Iterable[str]) -> str:
    """What one packed matrix of these -PT modules is called in files."""
    parents, _, leaves = zip(*(module.rpartition(".") for module in modules), strict=True)
    if len(leaves) == 1:
        return f"{parents[0]}.{leaves[0]}" if parents[0] else leaves[0]
    return f"{parents[0]}.{_FUSED.get(leaves, '_'.join(leaves))}"


@final
class PackedCheckpointSource:
    """The tensors of a packed checkpoint. `source` reads those that are stored plainly, or only surveys all of them.

    On a CPU the packed matrices are the files' own pages, which the system reads when they are first used, and may drop
    and read again: the files must not be written to while the model is in use. `advance`, if given, is told the bytes
    of each matrix when it is read.

    With a `reader`, which `source` has too, nothing is mapped: a matrix lies in what is staged, until the next is.
    """

    def __init__(
        self,
        source: TensorSource,
        index: CheckpointIndex,
        preset: QuantPreset,
        *,
        advance: Advance | None = None,
        reader: StagedReader | None = None,
    ) -> None:
        self._source = source
        self._index = index
        self._preset = preset
        self._advance = advance
        self._reader = reader
        self._files: dict[Path, mmap.mmap] = {}
        self._copied: list[tuple[mmap.mmap, int, int]] = []

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._source or self._holds(name.removesuffix(".weight"))

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        """As `source` reads it."""
        self._source.read_into(out, parts)

    def read_packed(
        self, parts: Mapping[str, int], in_features: int, device: torch.device
    ) -> Sequence[StoredMatrix] | None:
        """The packed matrix, as one or, where the parts are stored apart, as one each; on "meta" its shapes only. None
        where it is stored plainly, and the preset says so.

        Raises TensorError where a tensor is missing, has another shape or dtype, or values that the format has not.
        """
        self._drop_copied_pages()
        stored = {packed_name(parts): sum(parts.values())}
        if all(map(self._holds, parts)):
            stored = dict(parts)
        elif not self._holds(packed_name(parts)):
            if matrix_scheme(self._preset, parts, in_features) is None:
                return None
            raise TensorError(
                f"{self._index.folder} has no matrix {packed_name(parts)!r}, but by config.json it is packed as "
                f"{self._preset.name!r}",
                hint=_SAVE_AGAIN,
            )
        return [self._matrix(name, num_rows, in_features, device) for name, num_rows in stored.items()]

    def _holds(self, name: str) -> bool:
        """Whether this matrix is stored packed."""
        return f"{name}.panels" in self._index.tensors or f"{name}.codes" in self._index.tensors

    def _matrix(self, name: str, num_rows: int, in_features: int, device: torch.device) -> StoredMatrix:
        if f"{name}.panels" in self._index.tensors and name not in _LOOKED_UP and in_features % INT4_GROUP == 0:
            tensors = self._tensors(name, _panel_tensors(num_rows, in_features), device)
            return PanelInt4(**tensors, out_features=num_rows, in_features=in_features)
        codes = self._index.tensors.get(f"{name}.codes")
        if name in _LOOKED_UP or (codes is not None and codes.dtype == "I8"):
            return PackedInt8(**self._tensors(name, _int8_tensors(num_rows, in_features), device))
        return PackedInt4(**self._tensors(name, self._int4_tensors(name, num_rows, in_features), device))

    def _tensors(
        self, name: str, wanted: Mapping[str, tuple[str, tuple[int, ...]]], device: torch.device
    ) -> dict[str, Tensor]:
        """Those of a matrix by the end of their names; `wanted` are their dtypes and shapes."""
        for leaf, (dtype, shape) in wanted.items():
            self._check_fit(f"{name}.{leaf}", dtype, shape)
        if device.type == "meta":
            return {leaf: self._read(f"{name}.{leaf}", device) for leaf in wanted}
        if self._reader is not None:
            tensors = {leaf: self._staged(f"{name}.{leaf}", self._reader) for leaf in wanted}
        else:
            tensors = {leaf: self._mapped(f"{name}.{leaf}") for leaf in wanted}
            # Other devices have memory of their own, and kernels put codes into an order of theirs. What is used where
            # it is comes back with its first use.
            self._copied += [self._place(f"{name}.{leaf}") for leaf in wanted]
        for leaf, tensor in tensors.items():
            check_values(f"{name}.{leaf}", tensor)
        if self._advance is not None:
            self._advance(sum(tensor.nbytes for tensor in tensors.values()))
        return {leaf: tensor.to(device) for leaf, tensor in tensors.items()}

    def _int4_tensors(self, name: str, num_rows: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of the tensors of a 4-bit matrix, by the end of their names; the scales decide."""
        scales = self._index.tensors.get(f"{name}.scales")
        dtype, num_groups = "I8", 1
        if scales is not None and len(scales.shape) == 2:
            dtype, num_groups = scales.dtype, scales.shape[1]
        if dtype not in ("I8", "F16", "BF16", "F32") or not num_groups or in_features % (2 * num_groups):
            raise TensorError(
                f"tensor '{name}.scales' is {dtype} with {num_groups} groups in a row, which {in_features} inputs do "
                "not divide into",
                hint=_SAVE_AGAIN,
            )
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("U8", (num_rows, in_features // 2)),
            "scales": (dtype, (num_rows, num_groups)),
        }
        if dtype == "I8":
            wanted["row_scales"] = ("F32", (num_rows,))
        if f"{name}.zeros" in self._index.tensors:
            wanted["zeros"] = ("U8", (num_rows, num_groups))
        if f"{name}.input_order" in self._index.tensors:
            wanted["input_order"] = ("I32", (in_features,))
        return wanted

    def _check_fit(self, key: str, dtype: str, shape: tuple[int, ...]) -> None:
        info = self._index.tensors.get(key)
        if info is None:
            raise TensorError(f"{self._index.folder} has no tensor {key!r}", hint=_SAVE_AGAIN)
        if (info.dtype, info.shape) != (dtype, shape):
            raise TensorError(
                f"tensor {key!r} is stored as {info.dtype} {list(info.shape)}, but the model needs {dtype} "
                f"{list(shape)}",
                hint=_SAVE_AGAIN,
            )

    def _read(self, key: str, device: torch.device) -> Tensor:
        info = self._index.tensors[key]
        out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device=device)
        self._source.read_into(out, {key: info.shape[0]})
        return out

    def _staged(self, key: str, reader: StagedReader) -> Tensor:
        info = self._index.tensors[key]
        content = reader.view(info)
        if content is None:
            return self._read(key, torch.device("cpu"))
        return torch.frombuffer(content, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)

    def _mapped(self, key: str) -> Tensor:
        info = self._index.tensors[key]
        file, start, stop = self._place(key)
        if len(file) < stop:
            raise CorruptFileError(
                f"{info.file} is cut short inside tensor {key!r}: expected {stop} bytes or more, it has {len(file)}",
                hint="the file changed while it was being read: save or fetch it again",
            )
        dtype = TORCH_DTYPES[info.dtype]
        flat = torch.frombuffer(file, dtype=dtype, count=info.num_bytes // dtype.itemsize, offset=start)
        return flat.view(info.shape)

    def _place(self, key: str) -> tuple[mmap.mmap, int, int]:
        info = self._index.tensors[key]
        if info.file not in self._files:
            with info.file.open("rb") as file:
                # A private mapping: torch wants memory that could be written to, and nothing is.
                self._files[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[info.file], info.start, info.start + info.num_bytes

    def _drop_copied_pages(self) -> None:
        """Give back the pages of earlier matrices that were copied. Should one still be in use, it is read again."""
        for file, start, stop in self._copied:
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            file.madvise(mmap.MADV_DONTNEED, first, stop - first)
        self._copied.clear()


def _int8_tensors(num_rows: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors of an 8-bit matrix, by the end of their names."""
    return {"codes": ("I8", (num_rows, in_features)), "scales": ("F32", (num_rows,))}


def _panel_tensors(num_rows: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of the tensors of a 4-bit matrix of our own."""
    panels = panel_shape(num_rows, in_features)
    return {"panels": ("U8", panels), "row_scales": ("F32", (panels[0] * PANEL_ROWS,))}


def check_values(key: str, tensor: Tensor) -> None:
    """Raises TensorError for values that would break a product, or every answer."""
    problem = None
    # By numpy: torch would have threads of its own look, beside those that read experts while the model runs.
    if tensor.dtype == torch.int8 and tensor.numpy().min(initial=0) < -127:
        problem = "-128, below the least code"
    elif tensor.is_floating_point() and not np.isfinite(tensor.float().numpy()).all():
        problem = f"{int((~tensor.isfinite()).sum())} values that are not finite (NaN or infinity)"
    elif tensor.dtype == torch.int32 and not torch.equal(tensor.sort().values, torch.arange(len(tensor)).int()):
        problem = f"something else than each number below {len(tensor)} once"
    if problem is not None:
        raise TensorError(f"tensor {key!r} holds {problem}", hint=_SAVE_AGAIN)
