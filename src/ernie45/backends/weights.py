"""Building the decoder's parts from a checkpoint's tensors, by their -PT names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from ernie45.backends.base import BuildOptions, Streaming
from ernie45.backends.compiled import compiled_stage
from ernie45.backends.decoder import (
    Attention,
    Decoder,
    DecoderLayer,
    DenseMLP,
    ExpertBank,
    ExpertMLP,
    ExpertTable,
    Norm,
    NormedHead,
    ResidentExperts,
    Router,
    Stage,
)
from ernie45.backends.native_stage import native_head, native_stage
from ernie45.backends.streamed import ExpertStore
from ernie45.checkpoint.read import BlockSource, PackedSource, TensorSource
from ernie45.experts.trace import BankLog, RoutingLog
from ernie45.kernels.bitsandbytes import BnbInt8Linear, Nf4Linear
from ernie45.kernels.linear import DenseEmbedding, DenseLinear, Embedding, Linear, packs
from ernie45.kernels.ops import RotaryTable
from ernie45.kernels.packed_linear import PackedEmbedding, StackedLinear, build_packed_linear
from ernie45.kernels.panels import (
    PanelEmbedding,
    PanelLinear,
    PanelMemory,
    Staging,
    dense_panels,
    packed_panels,
    room_for_panels,
    takes_panels,
)
from ernie45.presets import INT4_GROUP, Part, WeightPart
from ernie45.quantization.packed import Packed, PackedInt8, empty_packed
from ernie45.quantization.panels import StoredMatrix
from ernie45.quantization.quantize import quantize_blocks_into, quantize_into
from ernie45.spec import ExpertSpec, ModelSpec

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


class WeightBuilder:
    """Reads the weights of one checkpoint to `device`, quantises what the preset covers, and puts the parts of a
    Decoder together. `placed` counts their bytes, and `stores` are of experts that are read later, by the first number
    of their bank; builders made by `on` share both, and the log of what routers choose."""

    def __init__(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> None:
        self.spec, self.source, self.options = spec, source, options
        self._packed_source = source if isinstance(source, PackedSource) else None
        self.dtype, self.device = options.dtype, torch.device(options.placement.embedding)
        self.placed: Counter[WeightPart] = Counter()
        self._staging, self._code_staging = Staging(), Staging()
        self._memory, self._is_staged = PanelMemory(), False  # whether it makes experts of what a reader has staged
        self.stores: dict[int, ExpertStore] = {}
        self.routing = None if spec.experts is None else RoutingLog(spec.experts.num_experts)

    def on(self, device: str) -> WeightBuilder:
        """The builder of the same model for another device."""
        if torch.device(device) == self.device:
            return self
        other = WeightBuilder(self.spec, self.source, self.options)
        other.device, other.placed = torch.device(device), self.placed
        other._staging, other._code_staging, other._memory = self._staging, self._code_staging, self._memory
        other.stores, other.routing = self.stores, self.routing
        return other

    def decoder(self) -> Decoder:
        """The whole text trunk."""
        spec, placement = self.spec, self.options.placement
        embedding, tied_head = self.embedding()
        stages = self.stages()
        last = self.on(placement.head)
        return Decoder(
            spec=spec,
            embedding=embedding,
            stages=tuple(compiled_stage(native_stage(stage)) for stage in stages),
            head=native_head(NormedHead(norm=last.norm("model.norm.weight"), linear=tied_head or last.head())),
            head_device=last.device,
            expert_caches=tuple(store.cache for store in self.stores.values()),
            routing=self.routing,
        )

    def stages(self) -> tuple[Stage, ...]:
        """The layers, by the devices that follow one another; the rotary table is once on each."""
        devices = self.options.placement.layers
        # The layers come first: what a damaged config asks for is refused before a table is made by it.
        layers = [self.layer(index) for index in range(len(devices))]
        tables = {name: self.on(name).rotary() for name in dict.fromkeys(devices)}
        runs = [(name, list(run)) for name, run in groupby(range(len(devices)), key=devices.__getitem__)]
        return tuple(
            Stage(
                device=torch.device(name),
                first=indices[0],
                layers=tuple(layers[indices[0] : indices[-1] + 1]),
                rotary=tables[name],
            )
            for name, indices in runs
        )

    def rotary(self) -> RotaryTable:
        return RotaryTable(
            head_dim=self.spec.head_dim,
            theta=self.spec.rope_theta,
            context_tokens=self.options.context_tokens,
            device=self.device,
            num_time_frequencies=0 if self.spec.vision is None else self.spec.vision.num_time_frequencies,
        )

    def embedding(self) -> tuple[Embedding, Linear | None]:
        """The embedding, and the output head where the embedding serves as one: the files decide, a head of its own is
        used whatever the config says."""
        spec = self.spec
        shape = (spec.vocab_size, spec.hidden_size)
        tied = f"{_HEAD}.weight" not in self.source and spec.tied is not False
        packed = self.packed(_EMBEDDING, "embedding")
        if tied and self.options.placement.head == self.options.placement.embedding:
            shared = self.tied_panels(packed)
            if shared is not None:
                self.placed["embedding"] += math.prod(shape) * (self.dtype.itemsize if packed is None else 1)
                self.placed["scales"] += shared.scale_bytes
                return PanelEmbedding(shared, self.dtype), shared
        table: Tensor | PackedInt8
        embedding: Embedding
        if packed is not None:
            table = packed
            embedding = PackedEmbedding(packed, self.dtype)
            self.placed["embedding"] += packed.codes.numel()
            self.placed["scales"] += 4 * packed.scales.numel()
        else:
            table = self.tensor(shape, f"{_EMBEDDING}.weight", part="embedding")
            embedding = DenseEmbedding(table)
        return embedding, self.on(self.options.placement.head).tied_head(table, self.device) if tied else None

    def tied_panels(self, packed: PackedInt8 | None) -> PanelLinear | None:
        """The embedding's table as a matrix in panels that serves as the head, too, where the kernels take it."""
        spec = self.spec
        if not takes_panels(self.dtype, self.device, spec.hidden_size):
            return None
        if packed is not None:
            return packed_panels(packed, self.head_bias(), self._memory, in_place=self._packed_source is None)
        if self.dtype != torch.bfloat16:
            return None
        return self.dense_panels(spec.hidden_size, {_EMBEDDING: spec.vocab_size}, self.head_bias())

    def dense_panels(self, in_features: int, parts: Mapping[str, int], bias: Tensor | None) -> PanelLinear:
        """A bfloat16 matrix, read into the place where it is put into panels."""
        out_features = sum(parts.values())
        rows = room_for_panels(self._memory, out_features, in_features)
        self.source.read_into(rows[:out_features], _weights(parts))
        return dense_panels(rows, out_features, bias)

    def tied_head(self, table: Tensor | PackedInt8, lies_on: torch.device) -> Linear:
        """The embedding's table as the output head; a copy of it where that is on another device."""
        bias = self.head_bias()
        linear: Linear
        if isinstance(table, PackedInt8):
            codes, scales = table.codes.to(self.device), table.scales.to(self.device)
            linear = build_packed_linear(PackedInt8(codes=codes, scales=scales), bias, self.dtype, self._memory)
        else:
            # Not packed: that would double it, for the embedding is looked up by row.
            linear = DenseLinear(table.to(self.device), bias, pack=False)
        if self.device != lies_on:
            self._count("head", linear)
        return linear

    def head(self) -> Linear:
        """An output head of its own."""
        spec = self.spec
        packed = self.packed(_HEAD, "head")
        bias = self.head_bias()
        linear: Linear
        if packed is not None:
            in_place = self._packed_source is None
            linear = build_packed_linear(packed, bias, self.dtype, self._memory, in_place=in_place)
        else:
            linear = self.dense(spec.hidden_size, {_HEAD: spec.vocab_size}, bias)
        self._count("head", linear)
        return linear

    def dense(self, in_features: int, parts: Mapping[str, int], bias: Tensor | None) -> Linear:
        """A matrix in the model's dtype."""
        if self.dtype == torch.bfloat16 and takes_panels(self.dtype, self.device, in_features):
            return self.dense_panels(in_features, parts, bias)
        return self.torch_dense(in_features, parts, bias)

    def torch_dense(self, in_features: int, parts: Mapping[str, int], bias: Tensor | None) -> DenseLinear:
        """The same for torch."""
        if packs(self.dtype, self.device):
            return DenseLinear(self.staged(in_features, parts), bias)
        return DenseLinear(self.read((sum(parts.values()), in_features), _weights(parts)), bias)

    def head_bias(self) -> Tensor | None:
        if f"{_HEAD}.bias" not in self.source:
            return None
        return self.read((self.spec.vocab_size,), {f"{_HEAD}.bias": self.spec.vocab_size})

    def layer(self, index: int) -> DecoderLayer:
        """One block."""
        prefix = f"model.layers.{index}."
        has_experts = self.spec.experts is not None and self.spec.experts.in_layer(index)
        here = self.on(self.options.placement.layers[index])
        return DecoderLayer(
            attention_norm=here.norm(prefix + "input_layernorm.weight"),
            attention=here.attention(prefix + "self_attn."),
            mlp_norm=here.norm(prefix + "post_attention_layernorm.weight"),
            mlp=here.experts(prefix + "mlp.", self.options.placement.experts[index])
            if has_experts
            else here.mlp(prefix + "mlp.", self.spec.intermediate_size, part="dense_mlp", has_bias=self.spec.use_bias),
        )

    def attention(self, prefix: str) -> Attention:
        spec = self.spec
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        heads = {prefix + "q_proj": query_size, prefix + "k_proj": kv_size, prefix + "v_proj": kv_size}
        out = {prefix + "o_proj": spec.hidden_size}
        return Attention(
            qkv=self.linear(spec.hidden_size, heads, part="attention", has_bias=spec.use_bias),
            out=self.linear(query_size, out, part="attention", has_bias=spec.use_bias),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )

    def mlp(self, prefix: str, width: int, *, part: Part, has_bias: bool) -> DenseMLP:
        hidden_size = self.spec.hidden_size
        gate_up = {prefix + "gate_proj": width, prefix + "up_proj": width}
        return DenseMLP(
            gate_up=self.linear(hidden_size, gate_up, part=part, has_bias=has_bias),
            down=self.linear(width, {prefix + "down_proj": hidden_size}, part=part, has_bias=has_bias),
        )

    def experts(self, prefix: str, bank_device: str) -> ExpertMLP:
        experts = self.spec.experts
        assert experts is not None
        shared = None
        if experts.num_shared_experts:
            width = experts.num_shared_experts * experts.intermediate_size
            shared = self.mlp(prefix + "shared_experts.", width, part="shared_experts", has_bias=self.spec.use_bias)
        # The two banks of a vision-language model lie in one row: experts, and rows of the correction bias.
        text, vision = experts, None if self.spec.vision is None else self.spec.vision.experts
        text_gate = self.gate(prefix + "gate.weight", text)
        vision_gate = None if vision is None else self.gate(prefix + "gate.weight_1", vision)
        correction = None
        if text.has_correction_bias:
            shape = (1 if vision is None else 2, text.num_experts)
            name = prefix + "moe_statics.e_score_correction_bias"
            correction = self.tensor(shape, name, part="router", dtype=torch.float32)
        there = self.on(bank_device)
        return ExpertMLP(
            text=there.bank(prefix, text, text_gate, 0, None if correction is None else correction[:1]),
            vision=None
            if vision is None or vision_gate is None
            else there.bank(
                prefix, vision, vision_gate, text.num_experts, None if correction is None else correction[1:]
            ),
            shared=shared,
        )

    def gate(self, name: str, experts: ExpertSpec) -> Tensor:
        """A router's weight, in float32 whatever the model's dtype, as published."""
        return self.tensor((experts.num_experts, self.spec.hidden_size), name, part="router", dtype=torch.float32)

    def bank(self, prefix: str, experts: ExpertSpec, gate: Tensor, first: int, correction: Tensor | None) -> ExpertBank:
        """A router with this weight, and its experts from number `first` on."""
        assert self.routing is not None
        numbers, layer = range(first, first + experts.num_experts), int(prefix.split(".")[2])
        table: ExpertTable
        if self.options.streaming is None:
            table = ResidentExperts(experts=tuple(self.expert(f"{prefix}experts.{n}.", experts) for n in numbers))
        else:
            table = self._streamed(self.options.streaming, experts, first, layer=layer)
        return ExpertBank(
            router=Router(
                weight=gate,
                correction=correction,
                experts_per_token=experts.experts_per_token,
                norm_min=experts.norm_min,
            ),
            experts=table,
            device=self.device,
            log=BankLog(log=self.routing, layer=layer, bank="vision" if first else "text"),
        )

    def expert(self, prefix: str, experts: ExpertSpec, memory: PanelMemory | None = None) -> DenseMLP:
        """One routed expert; with `memory`, and all that are built after it, there."""
        if memory is not None:
            self._memory, self._is_staged = memory, True
        # With use_bias, Baidu's routed experts have biases and transformers' have none: the files decide.
        has_bias = f"{prefix}down_proj.bias" in self.source
        return self.mlp(prefix, experts.intermediate_size, part="routed_experts", has_bias=has_bias)

    def expert_is_in_panels(self, experts: ExpertSpec) -> bool:
        """Whether the native kernels work on routed experts of this width."""
        widths = self.spec.hidden_size, experts.intermediate_size
        return all(takes_panels(self.dtype, self.device, width) for width in widths)

    def _streamed(self, streaming: Streaming, experts: ExpertSpec, first: int, *, layer: int) -> ExpertTable:
        """The table of a layer whose experts are read as they are chosen. The slots of all layers are counted once."""
        if first not in self.stores:
            spec, options = self.spec, self.options  # a builder would keep its buffers as long as the store lives
            bank = streaming.banks[first > 0]
            num_slots = streaming.slots.vision if first else streaming.slots.text
            self.placed["routed_experts"] += num_slots * bank.code_bytes
            self.placed["scales"] += num_slots * bank.scale_bytes
            self.stores[first] = ExpertStore(
                streaming,
                lambda source: WeightBuilder(spec, source, options),
                experts,
                num_layers=self.spec.num_layers,
                first=first,
            )
        return self.stores[first].layer(layer)

    def linear(
        self, in_features: int, parts: Mapping[str, int], *, part: Part | Literal["vision"], has_bias: bool
    ) -> Linear:
        """One matrix out of several stored ones: `parts` are their names (without ".weight") and output widths."""
        bias = None
        if has_bias:
            bias = self.read((sum(parts.values()),), {f"{name}.bias": width for name, width in parts.items()})
        linear = self._matrix(in_features, parts, part, bias)
        self._count(part, linear)
        return linear

    def _matrix(
        self, in_features: int, parts: Mapping[str, int], part: Part | Literal["vision"], bias: Tensor | None
    ) -> Linear:
        if part != "vision":
            stored = self.stored(parts, in_features)
            if stored is not None and len(stored) == 1:
                return self._packed_linear(stored[0], bias)
            if stored is not None:
                return StackedLinear([self._packed_linear(piece, None) for piece in stored], bias)
            quantised = self.quantised(parts, in_features, part=part)
            if quantised is not None:
                linear = build_packed_linear(quantised, bias, self.dtype, self._memory, in_place=True)
                # Codes that were rounded into the staging buffer must have been copied from there.
                assert isinstance(linear, PanelLinear) or not takes_panels(self.dtype, self.device, in_features)
                return linear
        scheme = None if part == "vision" else self.options.preset.scheme(part, in_features)
        if scheme == "nf4":
            return Nf4Linear(self.staged(in_features, parts).to(self.device), bias)
        if scheme == "bnb-int8":
            return BnbInt8Linear(self.staged(in_features, parts).to(self.device), bias)
        return self.torch_dense(in_features, parts, bias) if part == "vision" else self.dense(in_features, parts, bias)

    def _packed_linear(self, packed: StoredMatrix, bias: Tensor | None) -> Linear:
        return build_packed_linear(packed, bias, self.dtype, self._memory, is_staged=self._is_staged)

    def packed(self, name: str, part: Literal["embedding", "head"]) -> PackedInt8 | None:
        """A matrix of the vocabulary's height, if it is quantised in the files or by the preset."""
        spec = self.spec
        stored = self.stored({name: spec.vocab_size}, spec.hidden_size)
        packed = stored[0] if stored else self.quantised({name: spec.vocab_size}, spec.hidden_size, part=part)
        assert packed is None or isinstance(packed, PackedInt8)
        return packed

    def stored(self, parts: Mapping[str, int], in_features: int) -> Sequence[StoredMatrix] | None:
        """The matrix as the files hold it, if they hold it quantised, in as many pieces as cannot be joined."""
        if self._packed_source is None:
            return None
        return self._packed_source.read_packed(parts, in_features, self.device)

    def quantised(self, parts: Mapping[str, int], in_features: int, *, part: Part) -> Packed | None:
        """The matrix, rounded to int8 or int4 if the preset says so."""
        scheme = self.options.preset.scheme(part, in_features)
        if scheme not in ("int8", "int4"):
            return None
        take_codes = None
        if takes_panels(self.dtype, self.device, in_features):
            # int8 codes are put into panels where they lie; int4 ones are copied there, between their scales.
            take_codes = self._memory.take if scheme == "int8" else self._code_staging.room
        packed = empty_packed(scheme, sum(parts.values()), in_features, INT4_GROUP, self.device, take_codes)
        if self.device.type == "meta":
            self.staged(in_features, parts)
        elif part in ("embedding", "head") and isinstance(packed, PackedInt8) and isinstance(self.source, BlockSource):
            # As long as the vocabulary: the whole of one at a time would be the most that loading ever needs.
            (name,) = _weights(parts)
            quantize_blocks_into(packed, self.source.read_blocks(name, (packed.out_features, in_features)))
        else:
            quantize_into(packed, self.staged(in_features, parts), alone=self._is_staged)
        return packed

    def norm(self, name: str, *, part: Literal["norms", "vision"] = "norms") -> Norm:
        return Norm(weight=self.tensor((self.spec.hidden_size,), name, part=part), eps=self.spec.rms_norm_eps)

    def tensor(
        self, shape: tuple[int, ...], name: str, *, part: WeightPart, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor that is kept as it is."""
        tensor = self.read(shape, {name: shape[0]}, dtype)
        self.placed[part] += tensor.numel() * tensor.element_size()
        return tensor

    def read(self, shape: tuple[int, ...], parts: Mapping[str, int], dtype: torch.dtype | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        self.source.read_into(tensor, parts)
        return tensor

    def staged(self, in_features: int, parts: Mapping[str, int]) -> Tensor:
        """A weight that is about to be packed, quantised or copied, on the CPU, until the next one is read."""
        shape = (sum(parts.values()), in_features)
        weight = torch.empty(shape, dtype=self.dtype, device="meta")
        if self.device.type != "meta":
            weight = self._staging.room(shape, self.dtype)
        self.source.read_into(weight, _weights(parts))
        return weight

    def _count(self, part: WeightPart, linear: Linear) -> None:
        self.placed[part] += linear.code_bytes
        self.placed["scales"] += linear.scale_bytes


def _weights(parts: Mapping[str, int]) -> dict[str, int]:
    """The stored names of matrices."""
    return {f"{name}.weight": width for name, width in parts.items()}
