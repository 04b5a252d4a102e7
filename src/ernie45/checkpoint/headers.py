"""What a checkpoint folder holds, from safetensors headers alone.

Every dtype, shape and byte range is checked before a weight is read.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ernie45.errors import CheckpointError, ConfigError, CorruptFileError, TensorError
from ernie45.spec import DtypeName

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 20_000_000
MAX_DIMENSIONS = 16
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
    | {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}
)
# numpy has no bfloat16, so Paddle's files carry its bits as U16
_FLOAT_KINDS: Mapping[DtypeName, tuple[str, ...]] = MappingProxyType(
    {"bfloat16": ("BF16", "U16"), "float32": ("F32", "F64"), "float16": ("F16",)}
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".pkl")
_FETCH_AGAIN = "the file is damaged or half copied: delete it and fetch it again"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One stored tensor: `num_bytes` bytes of `file` from byte `start`, row-major and little-endian.
    `dtype` is the safetensors name ("BF16", "F32", …)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointIndex:
    """Every tensor of a checkpoint folder by name, in file order, and the files' merged `__metadata__`."""

    folder: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def main_dtype(self) -> DtypeName:
        """The floating-point dtype that most bytes are stored in; bfloat16 when there are none."""
        stored = {
            name: sum(info.num_bytes for info in self.tensors.values() if info.dtype in kinds)
            for name, kinds in _FLOAT_KINDS.items()
        }
        return max(stored, key=lambda name: stored[name])


def read_headers(folder: Path) -> CheckpointIndex:
    """Read and check the safetensors headers of a checkpoint folder; no tensor data is read.

    `model.safetensors.index.json` and the shards it names win over a single `model.safetensors`.
    Raises CheckpointError when there are no safetensors weights, CorruptFileError for a damaged file, and
    TensorError when index and shards disagree.
    """
    weight_map = read_weight_map(folder)
    if weight_map is None:
        path = folder / SINGLE_FILE
        if not path.is_file():
            raise _no_weights(folder)
        return read_file_headers(path)

    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise TensorError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files: {_listing(missing)}",
            hint="add the missing files, or load the model by its Hub name, which fetches them",
        )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        shard_tensors, shard_metadata = _read_header(folder / shard)
        _check_against_index(shard, shard_tensors, weight_map)
        tensors |= shard_tensors
        metadata |= shard_metadata
    return _build_index(folder, tensors, metadata)


def read_file_headers(path: Path) -> CheckpointIndex:
    """Read and check the header of one safetensors file. Raises CorruptFileError for a damaged one."""
    tensors, metadata = _read_header(path)
    return _build_index(path.parent, tensors, metadata)


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard file name, as `model.safetensors.index.json` says; None without such a file.

    Raises CorruptFileError when it is malformed or names a file outside the folder.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    weight_map = _parse_json_object(_read_bounded(path, CorruptFileError), path, CorruptFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path} has no weight_map", hint=_FETCH_AGAIN)
    for name, shard in weight_map.items():
        # Links are not followed for this: in the Hub's cache every file of a snapshot is a link out of it.
        is_plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & set("/\\:") and len(shard) < 250
        if not is_plain or not shard.endswith(".safetensors"):
            raise CorruptFileError(
                f"{path} puts tensor {name!r} into {shard!r:.200}, not a plain .safetensors file name",
                hint="weights are only read from files directly in the checkpoint's folder",
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object such as config.json. Raises ConfigError when it is missing or not one."""
    try:
        content = _read_bounded(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}", hint="give a complete checkpoint folder") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check the file's permissions") from error
    return _parse_json_object(content, path, ConfigError)


def _build_index(folder: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> CheckpointIndex:
    return CheckpointIndex(folder=folder, tensors=MappingProxyType(tensors), metadata=MappingProxyType(metadata))


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return TensorError(
            f"{folder} holds {_listing(shards)} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            hint=f"add the {INDEX_FILE} that belongs to these files",
        )
    if pickles:
        return CheckpointError(
            f"{folder} holds weights only as {_listing(pickles)}; pickles can run code and are never opened",
            hint="use a release with .safetensors files, or convert these on a machine that trusts them",
        )
    return CheckpointError(f"{folder} holds no {SINGLE_FILE}", hint="give a folder with safetensors weights")


def _check_against_index(shard: str, tensors: Mapping[str, TensorInfo], weight_map: Mapping[str, str]) -> None:
    promised = {name for name, file in weight_map.items() if file == shard}
    lacking = sorted(promised - tensors.keys())
    if lacking:
        raise TensorError(f"{shard} lacks tensors that the index promises: {_listing(lacking)}", hint=_FETCH_AGAIN)
    unlisted = sorted(tensors.keys() - promised)
    if unlisted:
        raise TensorError(
            f"{shard} holds tensors that the index does not place there: {_listing(unlisted)}",
            hint=f"{INDEX_FILE} belongs to other files: fetch the checkpoint again",
        )


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > MAX_HEADER_BYTES:
            raise CorruptFileError(
                f"{path} is no safetensors file: its {file_bytes} bytes announce a header of {header_bytes}",
                hint=_FETCH_AGAIN,
            )
        _check_length(path, expected=8 + header_bytes, actual=file_bytes)
        header = _parse_json_object(file.read(header_bytes), path, CorruptFileError)

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{path} has a __metadata__ that does not map text to text", hint=_FETCH_AGAIN)
    data_start = 8 + header_bytes
    tensors = [_parse_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.start, info.num_bytes))
    _check_coverage(path, tensors, data_start, file_bytes)
    return {info.name: info for info in tensors}, metadata


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptFileError(f"{path}: tensor {name!r} is described as {entry!r:.200}", hint=_FETCH_AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CorruptFileError(
            f"{path}: tensor {name!r} has the unknown dtype {dtype!r}",
            hint=f"known dtypes: {', '.join(DTYPE_BYTES)}",
        )
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CorruptFileError(f"{path}: tensor {name!r} has the shape {shape!r:.200}", hint=_FETCH_AGAIN)
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CorruptFileError(f"{path}: tensor {name!r} has the offsets {offsets!r:.200}", hint=_FETCH_AGAIN)
    begin, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise CorruptFileError(
            f"{path}: tensor {name!r} of {dtype} {shape} needs {needed} bytes, but its offsets "
            f"{begin} to {end} give it {end - begin}",
            hint=_FETCH_AGAIN,
        )
    return TensorInfo(name=name, file=path, dtype=dtype, shape=tuple(shape), start=data_start + begin, num_bytes=needed)


def _check_coverage(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    position = data_start
    for info in tensors:
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise CorruptFileError(f"{path}: tensor {info.name!r} {problem}", hint=_FETCH_AGAIN)
        position += info.num_bytes
    _check_length(path, expected=position, actual=file_bytes)
    if file_bytes > position:
        raise CorruptFileError(
            f"{path} goes on after its last tensor: expected {position} bytes, it has {file_bytes}",
            hint=_FETCH_AGAIN,
        )


def _check_length(path: Path, *, expected: int, actual: int) -> None:
    if actual < expected:
        raise CorruptFileError(f"{path} is cut short: expected {expected} bytes, it has {actual}", hint=_FETCH_AGAIN)


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _read_bounded(path: Path, error_class: type[CheckpointError]) -> bytes:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise error_class(f"{path} has {num_bytes} bytes, more than {MAX_JSON_BYTES}", hint=_FETCH_AGAIN)
    return path.read_bytes()


def _parse_json_object(content: bytes, path: Path, error_class: type[CheckpointError]) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        # json's own errors and undecodable bytes are ValueErrors; absurdly deep nesting exhausts the stack.
        raise error_class(f"{path} does not hold valid JSON: {error}", hint=_FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise error_class(f"{path} holds JSON, but not an object in braces", hint=_FETCH_AGAIN)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} occurs twice")
        if not name.isprintable():  # it would end up in messages
            raise ValueError(f"the key {name!r} holds characters that cannot be shown")
        result[name] = value
    return result


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
