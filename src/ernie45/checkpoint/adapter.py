"""LoRA adapters, merged into a model's weights while they are read.

A PEFT adapter folder holds adapter_config.json and, in adapter_model.safetensors, two factors for each adapted matrix:
A [r, in] and B [out, r]. Merging adds scale * B @ A to the matrix (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from ernie45.checkpoint.adapter_config import MERGE_HINT, LoraSettings, read_lora_settings
from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo, read_file_headers
from ernie45.checkpoint.layouts import LayoutName, Piece
from ernie45.checkpoint.read import TORCH_DTYPES, BlockSource, TensorReader, TensorSource
from ernie45.errors import CheckpointError, TensorError, UnsupportedError

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_BLOCK_VALUES = 4 << 20
_MAX_KEY_CHARS = 200
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_FUSED_EXPERTS = re.compile(r"(?P<experts>.+\.mlp\.experts)(?P<inner>\.base_layer)?")
# transformers puts this before the trunk's names in its vision-language class; the -PT names lack it.
_TRUNK_OF_VL = "model.language_model."
_VISION_NAME = re.compile(r"\.(vision_tower|vision_model|resampler_model|text_moe|vision_moe)\.")
_PADDLE_NAME = re.compile(r"(^|\.)(ernie|qkv_proj|up_gate_proj)(\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Factors:
    """A stored pair: `a` [E * r, in], an expert's rows together, and `b` [out, r * E], an expert's columns E apart.
    A plain matrix is one expert."""

    module: str
    a: TensorInfo
    b: TensorInfo
    num_experts: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Delta:
    """What is added to one tensor: of an expert's B @ A, `num_rows` rows from row `first`."""

    factors: _Factors
    expert: int
    first: int
    num_rows: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.factors.a.shape[1]


@final
class Adapter:
    """A LoRA adapter, made by `read_adapter`. Its tensors are read when they are merged, and not kept."""

    def __init__(self, index: CheckpointIndex, deltas: Mapping[str, _Delta], base_model: str | None) -> None:
        self.folder = index.folder
        self.base_model = base_model
        self._deltas = deltas
        self._reader = TensorReader(index, _AsStored())
        # The experts of a layer share two pairs of factors, and are read one after the other.
        self._read = lru_cache(maxsize=2)(self._read_pair)

    @property
    def names(self) -> tuple[str, ...]:
        """The -PT names of the tensors it changes."""
        return tuple(self._deltas)

    def past_last_experts(self) -> tuple[str, ...]:
        """A name for each layer with fused experts, that the model only has if it has more experts than the adapter."""
        fused = {delta.factors.module: delta.factors.num_experts for delta in self._deltas.values()}
        layers = ((_FUSED_EXPERTS.fullmatch(module), num_experts) for module, num_experts in fused.items())
        return tuple(f"{match['experts']}.{num_experts}.down_proj.weight" for match, num_experts in layers if match)

    def check_fit(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises TensorError when the tensor `name` is adapted, but not of this shape."""
        delta = self._deltas.get(name)
        if delta is not None and delta.shape != shape:
            raise TensorError(
                f"the adapter changes {name!r} by a matrix of shape {list(delta.shape)}, but the model's has "
                f"{list(shape)}",
                hint=_other_base(self),
            )

    def merge_into(self, name: str, weight: Tensor) -> None:
        """Add scale * B @ A to `weight` [out, in], in float32, rounded once to its dtype. Does nothing to a tensor
        that is not adapted."""
        delta = self._deltas.get(name)
        if delta is None:
            return
        a, b = self._read(delta.factors)
        num_experts, rows = delta.factors.num_experts, slice(delta.first, delta.first + delta.num_rows)
        a = a.view(num_experts, -1, a.shape[1])[delta.expert].to(weight.device, torch.float32)
        b = b.view(b.shape[0], -1, num_experts)[rows, :, delta.expert].to(weight.device, torch.float32)
        step = max(1, _BLOCK_VALUES // weight.shape[1])
        for block, factor in zip(weight.split(step), b.split(step), strict=True):
            block.copy_(torch.addmm(block.float(), factor, a, alpha=delta.factors.scale))
            if not block.isfinite().all():
                raise TensorError(
                    f"the adapter in {self.folder} makes values of {name!r} that are not finite as {weight.dtype}",
                    hint="its training diverged, or dtype='bfloat16' or 'float32' is needed for its size",
                )

    def _read_pair(self, factors: _Factors) -> tuple[Tensor, Tensor]:
        pair = []
        for info in (factors.a, factors.b):
            out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
            self._reader.read_into(out, {info.name: info.shape[0]})
            pair.append(out)
        return pair[0], pair[1]


@final
class AdaptedSource:
    """Reads tensors from `source` and merges an adapter into them.

    The stored weights come in the dtype of `out`; the sum is computed in float32 and rounded once to that dtype.
    On the "meta" device only names and shapes are checked.
    """

    def __init__(self, source: TensorSource, adapter: Adapter) -> None:
        self._source = source
        self._adapter = adapter
        self._asked: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        """Fill `out` with the named tensors stacked along their first axis, each merged with what the adapter has
        for it. Raises TensorError also where the two do not fit."""
        out = out.detach()
        for name, num_rows in parts.items():
            self._adapter.check_fit(name, (num_rows, *out.shape[1:]))
        self._source.read_into(out, parts)
        self._asked.update(parts)
        if out.device.type == "meta":
            return
        first = 0
        for name, num_rows in parts.items():
            self._adapter.merge_into(name, out[first : first + num_rows])
            first += num_rows

    def read_blocks(self, name: str, shape: tuple[int, int]) -> Iterator[Tensor]:
        """An embedding or output head, which no adapter changes, piece by piece."""
        assert isinstance(self._source, BlockSource)
        return self._source.read_blocks(name, shape)

    def check_all_merged(self) -> None:
        """To be called when the model is built: raises TensorError when the adapter changes tensors that the model did
        not ask for, or was made for fewer experts than it has."""
        unknown = [name for name in self._adapter.names if name not in self._asked]
        if unknown:
            raise TensorError(
                f"the adapter in {self._adapter.folder} changes {len(unknown)} tensors that the model does not have: "
                f"{_listing(unknown)}",
                hint=_other_base(self._adapter),
            )
        beyond = [name for name in self._adapter.past_last_experts() if name in self._asked]
        if beyond:
            raise TensorError(
                f"the adapter in {self._adapter.folder} was made for fewer experts than the model has: it ends before "
                f"{beyond[0]!r}",
                hint=_other_base(self._adapter),
            )


def read_adapter(folder: Path) -> Adapter:
    """Read the settings of a PEFT LoRA adapter folder and the header of its weights; no tensor data is read.

    Raises:
        ConfigError: adapter_config.json is missing or malformed.
        UnsupportedError: the adapter does something else than plain LoRA on attention, MLP, expert or router weights,
            or changes a vision-language model's tower, resampler, routed experts or routers.
        CheckpointError: its weights are missing, or a pickle.
        CorruptFileError: the weight file is damaged.
        TensorError: tensors are missing, or contradict the settings.
    """
    settings = read_lora_settings(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / _PICKLE_FILE).is_file():
            raise CheckpointError(
                f"{folder} holds its adapter only as {_PICKLE_FILE}; pickles can run code and are never opened",
                hint="save it again with a current PEFT, which writes safetensors",
            )
        raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}", hint="give the complete folder that PEFT saved")
    index = read_file_headers(path)
    deltas: dict[str, _Delta] = {}
    adapted: list[str] = []
    for module, (a, b) in _pairs(index).items():
        name = _adapted_name(settings, module)
        factors = _factors(settings, module, name, a, b)
        adapted.append(name)
        deltas |= _deltas(factors, name)
    _check_targets(folder, settings, adapted)
    return Adapter(index, deltas, settings.base_model)


def _pairs(index: CheckpointIndex) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Module name to its A and B."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    for key, info in index.tensors.items():
        if ".embed_tokens." in key or ".lm_head." in key:
            raise UnsupportedError(
                f"the adapter in {index.folder} changes the embedding or the output head ({key}); ernie45 merges into "
                "attention, MLP, expert and router weights",
                hint=MERGE_HINT,
            )
        if _PADDLE_NAME.search(key):
            raise UnsupportedError(
                f"the adapter in {index.folder} was trained on Paddle weights: {key}",
                hint="merge it with the tool that trained it, and load the merged checkpoint",
            )
        if _VISION_NAME.search(key):
            raise UnsupportedError(
                f"the adapter in {index.folder} changes {key!r:.200}; of a vision-language model ernie45 merges into "
                "the attention, dense MLP and shared expert weights of the text trunk",
                hint=MERGE_HINT,
            )
        match = _KEY.fullmatch(key) if len(key) <= _MAX_KEY_CHARS else None
        if match is None:
            raise UnsupportedError(
                f"the adapter in {index.folder} holds {key!r:.200}, which is no factor of a plain LoRA", hint=MERGE_HINT
            )
        if not TORCH_DTYPES[info.dtype].is_floating_point or len(info.shape) != 2:
            raise TensorError(
                f"{info.file}: {key!r} is {info.dtype} {list(info.shape)}, and not a matrix of floating-point values",
                hint="save the adapter again, from a model that is not sharded over processes",
            )
        halves.setdefault(match["module"], {})[match["factor"]] = info
    if not halves:
        raise TensorError(f"{index.folder / WEIGHTS_FILE} holds no tensors", hint="save the adapter again")
    for module, half in halves.items():
        if len(half) != 2:
            lacking = "B" if "A" in half else "A"
            raise TensorError(
                f"the adapter in {index.folder} lacks 'base_model.model.{module}.lora_{lacking}.weight'",
                hint="the file is incomplete: save or fetch the adapter again",
            )
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _adapted_name(settings: LoraSettings, module: str) -> str:
    """What PEFT calls the adapted thing: a module, or a parameter where target_parameters named that.

    PEFT puts a wrapper round a module for each of its adapted parameters, the first one innermost (`base_layer`).
    """
    fused = _FUSED_EXPERTS.fullmatch(module)
    if fused is None:
        return f"{module}.weight" if _is_target(f"{module}.weight", settings.target_parameters) else module
    names = [f"{fused['experts']}.{parameter}" for parameter in ("gate_up_proj", "down_proj")]
    targets = [name for name in names if _is_target(name, settings.target_parameters)]
    if not targets or (fused["inner"] and len(targets) == 1):
        raise TensorError(
            f"the adapter has factors for {module!r}, but target_parameters does not say for which parameter of it",
            hint="adapter_config.json and the weights do not belong together: save the adapter again",
        )
    return targets[0] if fused["inner"] else targets[-1]


def _factors(settings: LoraSettings, module: str, name: str, a: TensorInfo, b: TensorInfo) -> _Factors:
    rank = settings.rank_of(name)
    num_experts = a.shape[0] // rank if _FUSED_EXPERTS.fullmatch(module) else 1
    if num_experts == 0 or a.shape[0] != rank * num_experts or b.shape[1] != a.shape[0]:
        raise TensorError(
            f"the adapter's {module} has A {list(a.shape)} and B {list(b.shape)}, which do not fit its rank {rank}",
            hint="adapter_config.json and the weights do not belong together: save the adapter again",
        )
    return _Factors(module=module, a=a, b=b, num_experts=num_experts, scale=settings.scale_of(name))


def _deltas(factors: _Factors, name: str) -> dict[str, _Delta]:
    """The -PT tensors that a pair of factors changes. A fused gate_up_proj is gate, then up."""
    num_rows = factors.b.shape[0]
    if not _FUSED_EXPERTS.fullmatch(factors.module):
        module = factors.module
        if module.startswith(_TRUNK_OF_VL):
            module = "model." + module.removeprefix(_TRUNK_OF_VL)
        return {f"{module}.weight": _Delta(factors=factors, expert=0, first=0, num_rows=num_rows)}
    experts, _, parameter = name.rpartition(".")
    half = num_rows // 2
    leaves = {"gate_proj": (0, half), "up_proj": (half, num_rows)}
    if parameter == "down_proj":
        leaves = {"down_proj": (0, num_rows)}
    return {
        f"{experts}.{expert}.{leaf}.weight": _Delta(factors=factors, expert=expert, first=first, num_rows=end - first)
        for expert in range(factors.num_experts)
        for leaf, (first, end) in leaves.items()
    }


def _check_targets(folder: Path, settings: LoraSettings, adapted: list[str]) -> None:
    for target in settings.target_modules + settings.target_parameters:
        if not any(_is_target(name, (target,)) for name in adapted):
            raise TensorError(
                f"the adapter in {folder} names the target {target!r}, but holds no tensors for it",
                hint="the file is incomplete, or the target was no module of the model: fetch or train it again",
            )


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _other_base(adapter: Adapter) -> str:
    trained_on = f"it was trained on {adapter.base_model!r}" if adapter.base_model else "it belongs to another model"
    return f"{trained_on}; give the model that the adapter was made for"


def _listing(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@final
class _AsStored:
    """The layout of an adapter's file: tensors by their own names."""

    name: LayoutName = "pt"

    def locate(self, name: str) -> Piece:
        return Piece(key=name)

    def names_in(self, key: str) -> tuple[str, ...]:
        return (key,)
