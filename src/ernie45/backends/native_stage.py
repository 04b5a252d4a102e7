"""The decoder's layers on the native kernels: one call for all of a stage, hidden states changed in place."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from ernie45.backends.base import Batch, VisionTokens
from ernie45.backends.decoder import (
    Attention,
    Decoder,
    DenseMLP,
    ExpertBank,
    ExpertMLP,
    Head,
    Norm,
    NormedHead,
    ResidentExperts,
    Stage,
)
from ernie45.backends.kv_cache import DenseStore, Int8Store, KVCache, KVStore
from ernie45.backends.streamed import StreamedExperts
from ernie45.experts.trace import BankLog
from ernie45.kernels.native import (
    AttentionStruct,
    BatchStruct,
    Kernels,
    KVStruct,
    LayerStruct,
    MlpStruct,
    NormStruct,
    RouterStruct,
    batch_struct,
    kernels,
    kv_struct,
)
from ernie45.kernels.panels import PanelLinear, Staging
from ernie45.memory.workspace import PREFILL_CHUNK_TOKENS
from ernie45.quantization.panels import PANEL_ROWS

_MlpPointers = tuple[NormStruct, int | None, int | None, int | None]  # the rest of a LayerStruct
_MOST_AHEAD = 2  # experts of the next layer that are read on a guess


def native_stage(stage: Stage) -> Stage | NativeStage:
    """The same layers on the native kernels, if these serve all of them; else the stage as it is."""
    native = kernels()
    if native is None or stage.device.type != "cpu":
        return stage
    outputs = Staging()
    parts = [
        (
            _attention_part(native, layer.attention_norm, layer.attention),
            _mlp_part(native, layer.mlp_norm, layer.mlp, outputs),
        )
        for layer in stage.layers
    ]
    layers = [(attention, mlp) for attention, mlp in parts if attention is not None and mlp is not None]
    return NativeStage(native, stage, layers) if len(layers) == len(parts) else stage


def prefix_tokens(decoder: Decoder) -> int:
    """In multiples of how many tokens a prefix may be taken over: on the native kernels a token's keys and values are
    the same bits in whatever steps the tokens before it were run, elsewhere only in the same chunks."""
    return 1 if all(isinstance(stage, NativeStage) for stage in decoder.stages) else PREFILL_CHUNK_TOKENS


@final
class NativeStage:
    """What a `Stage` is, with its layers as structs. It keeps the stage, for structs hold addresses only."""

    def __init__(
        self, native: Kernels, stage: Stage, layers: Sequence[tuple[AttentionPart, DensePart | ExpertPart]]
    ) -> None:
        self.device = stage.device
        self._native, self._stage, self._layers = native, stage, layers
        self._layer_structs = (LayerStruct * len(layers))(
            *(LayerStruct(attention.struct, *mlp.pointers) for attention, mlp in layers)
        )
        streaming = [mlp for _, mlp in layers if isinstance(mlp, ExpertPart) and mlp.streams]
        for part, following in pairwise(streaming):
            part.following = following
        self._streams = bool(streaming)
        self._log = next((mlp.log for _, mlp in layers if isinstance(mlp, ExpertPart)), None)
        self._cache: KVCache | None = None
        self._kv_structs = (KVStruct * 0)()

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x [N, h] through the layers, in place."""
        cos, sin = (table[:, 0].contiguous() for table in self._stage.angles(batch))
        rows, _numbers = batch_struct([(row.slot, row.start, row.num_tokens) for row in batch.rows], cos, sin)
        if self._cache is not batch.cache:
            self._cache, self._kv_structs = batch.cache, self._structs(batch.cache)
        x = x.contiguous()
        is_recording = self._log is not None and self._log.is_recording
        if batch.vision is None and not self._streams and not is_recording:
            self._native.layers(self._layer_structs, self._kv_structs, rows, x)
            return x
        for (attention, mlp), kv in zip(self._layers, self._kv_structs, strict=True):
            attention(x, rows, kv)
            mlp(x, batch.vision)
        return x

    def _structs(self, cache: KVCache) -> ctypes.Array[KVStruct]:
        first, num_layers = self._stage.first, len(self._layers)
        stores = [_kv(cache.keys[layer], cache.values[layer]) for layer in range(first, first + num_layers)]
        return (KVStruct * num_layers)(*stores)


@final
class AttentionPart:
    """x += attention(norm(x))"""

    def __init__(self, native: Kernels, norm: Norm, attention: Attention, qkv: PanelLinear, out: PanelLinear) -> None:
        self._native = native
        norm_struct, self._weight = _norm(norm)
        sizes = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self.struct = AttentionStruct(norm_struct, qkv.struct, out.struct, *sizes)

    def __call__(self, x: Tensor, rows: BatchStruct, kv: KVStruct) -> None:
        self._native.attention(self.struct, rows, kv, x)


@final
class DensePart:
    """x += mlp(norm(x))"""

    def __init__(self, native: Kernels, norm: Norm, mlp: MlpStruct) -> None:
        self._native, self._mlp = native, mlp
        self._norm, self._weight = _norm(norm)

    @property
    def pointers(self) -> _MlpPointers:
        return self._norm, None, None, ctypes.addressof(self._mlp)

    def __call__(self, x: Tensor, tokens: VisionTokens | None) -> None:
        self._native.mlp(self._norm, self._mlp, x)


@final
class ExpertPart:
    """x += experts(norm(x)) + shared(norm(x)), by the bank of experts that a token belongs to."""

    def __init__(
        self,
        native: Kernels,
        norm: Norm,
        text: _Bank,
        vision: _Bank | None,
        shared: MlpStruct | None,
        outputs: Staging,
    ) -> None:
        """`outputs` is for those of experts that are not all in memory at once; the layers share it."""
        self._native, self._text, self._vision, self._shared = native, text, vision, shared
        self._norm, self._weight = _norm(norm)
        self._outputs = outputs
        self.following: ExpertPart | None = None

    @property
    def streams(self) -> bool:
        """Whether experts are read as they are chosen, which one call for all layers cannot do."""
        return isinstance(self._text.experts, StreamedExperts)

    @property
    def log(self) -> BankLog:
        """Which is told what was chosen, as one call for all layers cannot do either."""
        return self._text.log

    @property
    def pointers(self) -> _MlpPointers:
        """Those of a step without pictures."""
        bank, shared = self._text, self._shared
        addresses = ctypes.addressof(bank.router), ctypes.addressof(bank.table)
        return self._norm, *addresses, None if shared is None else ctypes.addressof(shared)

    def __call__(self, x: Tensor, tokens: VisionTokens | None) -> None:
        if tokens is None:
            self._run(self._text, x)
            return
        assert self._vision is not None
        for bank, numbers in ((self._text, tokens.text), (self._vision, tokens.routed)):
            if len(numbers):
                rows = x[numbers]
                self._run(bank, rows)
                x[numbers] = rows

    def _run(self, bank: _Bank, x: Tensor) -> None:
        chosen, shares = self._native.route(self._norm, bank.router, x)
        if bank.log.is_recording:
            bank.log.record(chosen.numpy())
        if not isinstance(bank.experts, StreamedExperts):
            self._native.experts(self._norm, bank.table, self._shared, chosen, shares, x)
            return
        num_tokens, num_chosen = chosen.shape
        outputs = self._outputs.room((num_tokens * (num_chosen + 1), x.shape[1]), torch.float32)
        inputs = chosen, shares, x

        def meanwhile() -> None:
            ahead = x
            if self._shared is not None:
                self._native.experts(self._norm, bank.table, self._shared, *inputs, [], outputs)
                ahead = x + outputs[-num_tokens:].to(x.dtype)
            if self.following is not None:
                self.following.read_ahead(ahead)

        with closing(bank.experts.groups(sorted(set(chosen.flatten().tolist())), meanwhile)) as groups:
            for group in groups:
                bank.point_at(group)
                numbers = [number for number, _ in group]
                self._native.experts(self._norm, bank.table, None, *inputs, numbers, outputs)
        self._native.add_outputs(outputs, has_shared=self._shared is not None, chosen=chosen, shares=shares, x=x)

    def read_ahead(self, x: Tensor) -> None:
        """Have read what these hidden states would choose, which lack what the experts of the layer before will add."""
        experts = self._text.experts
        assert isinstance(experts, StreamedExperts)
        chosen, _ = self._native.route(self._norm, self._text.router, x)
        experts.read_ahead(dict.fromkeys(chosen.t().flatten().tolist()), _MOST_AHEAD)


@final
class _Bank:
    """A router and the addresses of its experts, those that are in memory now."""

    def __init__(self, bank: ExpertBank) -> None:
        self.experts, self.log, self._router = bank.experts, bank.log, bank.router
        router = bank.router
        num_experts, width = router.weight.shape
        correction = None if router.correction is None else router.correction.data_ptr()
        self.router = RouterStruct(
            router.weight.data_ptr(), correction, num_experts, width, router.experts_per_token, router.norm_min
        )
        self.table = (ctypes.c_void_p * num_experts)()
        self._structs: list[tuple[DenseMLP, MlpStruct]] = []
        if isinstance(bank.experts, ResidentExperts):
            self.point_at(list(enumerate(bank.experts.experts)))

    def point_at(self, group: Sequence[tuple[int, DenseMLP]]) -> None:
        """Put the addresses of these experts into the table, and let go of the group before."""
        self._structs = []
        for number, expert in group:
            struct = _mlp(expert)
            assert struct is not None
            self._structs.append((expert, struct))
            self.table[number] = ctypes.addressof(struct)


def native_head(head: NormedHead) -> Head:
    """The same on the native kernels, if its matrix is in panels."""
    native = kernels()
    if native is None or not isinstance(head.linear, PanelLinear):
        return head
    return _NativeHead(native, head, head.linear)


@final
class _NativeHead:
    def __init__(self, native: Kernels, head: NormedHead, linear: PanelLinear) -> None:
        self._native, self._linear = native, linear
        self._norm, self._weight = _norm(head.norm)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return self._native.head(self._norm, self._linear.struct, x.contiguous(), out)


def _attention_part(native: Kernels, norm: Norm, attention: Attention) -> AttentionPart | None:
    qkv, out = attention.qkv, attention.out
    if isinstance(qkv, PanelLinear) and isinstance(out, PanelLinear) and attention.head_dim % 32 == 0:
        return AttentionPart(native, norm, attention, qkv, out)
    return None


def _mlp_part(
    native: Kernels, norm: Norm, mlp: DenseMLP | ExpertMLP, outputs: Staging
) -> DensePart | ExpertPart | None:
    if isinstance(mlp, DenseMLP):
        struct = _mlp(mlp)
        return None if struct is None else DensePart(native, norm, struct)
    text, vision = _bank(mlp.text), None if mlp.vision is None else _bank(mlp.vision)
    shared = None if mlp.shared is None else _mlp(mlp.shared)
    if text is None or (vision is None) != (mlp.vision is None) or (shared is None) != (mlp.shared is None):
        return None
    return ExpertPart(native, norm, text, vision, shared, outputs)


def _bank(bank: ExpertBank) -> _Bank | None:
    table = bank.experts
    if isinstance(table, ResidentExperts):
        samples = table.experts
    else:  # which are all stored in the same way
        with closing(table.groups([0])) as groups:
            samples = tuple(expert for group in groups for _, expert in group)
    if bank.device.type != "cpu" or any(_mlp(expert) is None for expert in samples):
        return None
    return _Bank(bank)


def _mlp(mlp: DenseMLP) -> MlpStruct | None:
    gate_up, down = mlp.gate_up, mlp.down
    if not isinstance(gate_up, PanelLinear) or not isinstance(down, PanelLinear):
        return None
    has_whole_panels = gate_up.out_features % (2 * PANEL_ROWS) == 0  # of gate, and of up
    return MlpStruct(gate_up.struct, down.struct) if has_whole_panels else None


def _norm(norm: Norm) -> tuple[NormStruct, Tensor]:
    """The struct, and the weight in float32 that it points to."""
    weight = norm.weight.float().contiguous()
    return NormStruct(weight.data_ptr(), norm.eps), weight


def _kv(keys: KVStore, values: KVStore) -> KVStruct:
    if isinstance(keys, Int8Store) and isinstance(values, Int8Store):
        return kv_struct(keys.codes, values.codes, keys.scales, values.scales)
    assert isinstance(keys, DenseStore)
    assert isinstance(values, DenseStore)
    return kv_struct(keys.x, values.x, None, None)
