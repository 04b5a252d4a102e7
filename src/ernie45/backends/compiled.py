"""The decoder's layers through torch.compile, for GPUs: the many small operations of a layer become a few kernels.

Compiled is what has the same form in every step: all of a layer but attention, whose lengths grow, and the routed
experts, which tokens choose. The one size in it that changes is the number of tokens N, so each part has two versions,
for one token and for any number of them. Why so: docs/decisions/0022-compiled-decoding.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import Self

from ernie45.backends.base import Backend, Batch, Row
from ernie45.backends.decoder import DecoderLayer, DenseMLP, ExpertMLP, Layers, Stage
from ernie45.backends.kv_cache import KVCache
from ernie45.checkpoint.passing_thread import on_passing_thread
from ernie45.checkpoint.progress import Advance, byte_progress
from ernie45.kernels.linear import DenseLinear, Linear
from ernie45.types.placement import Placement
from ernie45.types.stats import StageClock

_DEVICE_TYPES = ("cuda",)
_WARM_UP_ROWS = (4, 1)  # one step for each version
_MAX_VERSIONS = 64  # of a part in this process, which models of the same shape share
_compiling: ContextVar[bool] = ContextVar("_compiling", default=False)


def compiled_stage(stage: Layers) -> Layers:
    """The same layers in a form that `compile_layers` compiles, where they lie on a GPU and `_can_compile` each; else
    the stage as it is."""
    if not isinstance(stage, Stage) or stage.device.type not in _DEVICE_TYPES:
        return stage
    return CompiledStage(stage) if all(map(_can_compile, stage.layers)) else stage


def compile_layers(backend: Backend, placement: Placement, clock: StageClock, *, show: bool) -> None:
    """Compile what a backend has on GPUs, by running steps. `clock` counts that as the stage "compile", and a bar
    shows it. A backend for which this was not called never compiles, so that no reply waits for it."""
    if not any(torch.device(name).type in _DEVICE_TYPES for name in placement.layers):
        return
    if torch._dynamo.config.disable:  # TORCH_COMPILE_DISABLE=1
        return
    step_bytes = sum(backend.weight_bytes.values())

    def steps(advance: Advance) -> None:
        _compiling.set(True)  # on this thread, which ends with it
        for num_rows in _WARM_UP_ROWS:
            _step(backend, placement, num_rows)
            advance(step_bytes)

    total_bytes = step_bytes * len(_WARM_UP_ROWS)
    with clock.stage("compile"), byte_progress("Compiling layers", total_bytes, show=show) as advance:
        on_passing_thread(steps, advance)


@torch.inference_mode()
def _step(backend: Backend, placement: Placement, num_rows: int) -> None:
    """Run the first token of so many sequences."""
    cache = KVCache.allocate(
        backend.spec,
        num_slots=num_rows,
        context_tokens=1,
        dtype=backend.dtype,
        kv_dtype="auto",
        placement=placement,
    )
    numbers, zeros = (make(num_rows, dtype=torch.int64, device=backend.device) for make in (torch.arange, torch.zeros))
    rows = tuple(Row(slot=slot, start=0, num_tokens=1) for slot in range(num_rows))
    backend.forward(Batch(rows=rows, token_ids=zeros, positions=zeros, slots=numbers, wanted=numbers, cache=cache))


@final
class CompiledStage:
    """What a `Stage` is, compiled by the steps of `compile_layers`. Without these it runs as it is; so it does where
    compiling fails, and a warning says why."""

    def __init__(self, stage: Stage) -> None:
        self.device = stage.device
        self._stage = stage
        self._parts: _Parts | None = None
        self._failed = False
        self._has_any_number = False  # the version for any number of tokens

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [N, h] through the layers; both lie on the device."""
        if not self._failed and (self._parts is not None or _compiling.get()):
            try:
                return self._run(x, batch)
            except torch.OutOfMemoryError:  # of a large step: compiling is not to blame
                raise
            except Exception as reason:  # not swallowed: what is wrong with the step itself is raised here once more
                computed = self._stage(x, batch)
                self._failed = True
                _warn(self.device, reason)
                return computed
        return self._stage(x, batch)

    def _run(self, x: Tensor, batch: Batch) -> Tensor:
        parts = self._parts = self._parts or _Parts.compile()
        cos, sin = self._stage.angles(batch)
        self._mark(cos, sin)
        for index, layer in enumerate(self._stage.layers, self._stage.first):
            self._mark(x)
            query, key, value = parts.project(layer, x, cos, sin)
            attended = layer.attention.attend(query, key, value, batch, index)
            self._mark(attended)
            if isinstance(layer.mlp, DenseMLP):
                x = parts.dense_rest(layer, x, attended)
            else:
                x, normed, shared = parts.expert_rest(layer, x, attended)
                routed = layer.mlp.routed(normed, batch.vision)
                x = x + (routed if shared is None else routed + shared)
        self._has_any_number = self._has_any_number or len(x) > 1
        return x

    def _mark(self, *tensors: Tensor) -> None:
        """Have tensors [N, …] compiled as of any N, where that is not done yet."""
        if len(tensors[0]) > 1 and not self._has_any_number:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """The compiled parts of a layer. What they are given of it are its tensors: layers alike share their versions."""

    project: Callable[[DecoderLayer, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    dense_rest: Callable[[DecoderLayer, Tensor, Tensor], Tensor]
    expert_rest: Callable[[DecoderLayer, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]

    @classmethod
    def compile(cls) -> Self:
        decorator = torch.compile(  # type: ignore[call-overload]
            fullgraph=True,
            dynamic=False,
            recompile_limit=_MAX_VERSIONS,
            # Round between fused operations where they would round by themselves.
            options={"emulate_precision_casts": True},
        )
        return cls(project=decorator(_project), dense_rest=decorator(_dense_rest), expert_rest=decorator(_expert_rest))


def _project(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, h] -> what attention takes"""
    return layer.attention.project(layer.attention_norm(x), cos, sin)


def _dense_rest(layer: DecoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """x [N, h] and what attention gives -> what the layer gives"""
    assert isinstance(layer.mlp, DenseMLP)
    x = x + layer.attention.out(attended)
    return x + layer.mlp(layer.mlp_norm(x))


def _expert_rest(layer: DecoderLayer, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [N, h] and what attention gives -> x, to which the MLP is added; norm(x); what the shared MLP makes of that"""
    assert isinstance(layer.mlp, ExpertMLP)
    x = x + layer.attention.out(attended)
    normed = layer.mlp_norm(x)
    return x, normed, None if layer.mlp.shared is None else layer.mlp.shared(normed)


def _can_compile(layer: DecoderLayer) -> bool:
    """Whether torch.compile can look into the products of the parts above: those of quantised matrices it cannot."""
    return all(isinstance(linear, DenseLinear) and not linear.packed for linear in _linears(layer))


def _linears(layer: DecoderLayer) -> Iterator[Linear]:
    yield from (layer.attention.qkv, layer.attention.out)
    mlp = layer.mlp if isinstance(layer.mlp, DenseMLP) else layer.mlp.shared
    if mlp is not None:
        yield from (mlp.gate_up, mlp.down)


def _warn(device: torch.device, reason: Exception) -> None:
    said = " ".join(str(reason).splitlines()[:2])  # the first names the backend, the second what it raised
    warnings.warn(
        f"torch.compile failed, so layers on {device} run without it, which is slower: {type(reason).__name__}: "
        f"{said}\n  -> it needs Triton and a C compiler; compile=False loads without trying",
        RuntimeWarning,
        stacklevel=2,
    )
