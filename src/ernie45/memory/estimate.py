"""What the weights of a model take in memory, from its shape: the same arithmetic as the build's, without the build."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ernie45.checkpoint.gptq_config import GptqConfig
from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo
from ernie45.errors import TensorError
from ernie45.parameters import count_resampler, count_vision_tower
from ernie45.presets import INT4_GROUP, Part, QuantPreset, WeightPart, code_bytes, scale_bytes
from ernie45.spec import ExpertSpec, ModelSpec

_FLOAT32_BYTES = 4
# What the names of a part's tensors contain; the first that is found counts, and what has none is a norm.
_MARKS: tuple[tuple[str, WeightPart], ...] = (
    ("vision_model.", "vision"),
    ("resampler_model.", "vision"),
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    (".self_attn.", "attention"),
    (".mlp.gate.", "router"),
    (".mlp.moe_statics.", "router"),
    (".mlp.shared_experts.", "shared_experts"),
    (".mlp.experts.", "routed_experts"),
    (".mlp.", "dense_mlp"),
)

PartBytes = Mapping[WeightPart, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSites:
    """Bytes by part of everything that can be put on a device by itself.

    Of each layer, `layers` has attention, norms, router, and the dense or shared MLP; `experts` has the routed experts,
    text's and pictures' (nothing in a dense layer); `active_experts` are the bytes of those that one text token goes
    through. `head` has the last norm and, where `has_own_head`, the output head; else the embedding is the head.
    """

    embedding: PartBytes
    layers: tuple[PartBytes, ...]
    experts: tuple[PartBytes, ...]
    active_experts: tuple[int, ...]
    head: PartBytes
    vision: PartBytes
    has_own_head: bool

    def total(self) -> Counter[WeightPart]:
        """Bytes by part of the whole model."""
        return add_parts((self.embedding, *self.layers, *self.experts, self.head, self.vision))

    def scaled_to(self, exact: PartBytes) -> WeightSites:
        """The same in the proportions of this estimate, with the totals that a build has found."""
        estimated = self.total()
        if estimated == Counter(exact):
            return self
        embedding = {part: share(num_bytes, part, estimated, exact) for part, num_bytes in self.embedding.items()}
        scaled = WeightSites(
            embedding=embedding,
            layers=tuple(_scaled(site, estimated, exact) for site in self.layers),
            experts=tuple(_scaled(site, estimated, exact) for site in self.experts),
            active_experts=tuple(
                share(num_bytes, "routed_experts", estimated, exact) for num_bytes in self.active_experts
            ),
            head=_scaled(self.head, estimated, exact),
            vision=_scaled(self.vision, estimated, exact),
            has_own_head=self.has_own_head,
        )
        # What rounding left over, and parts that no estimate knew of, stand with the embedding.
        for part, num_bytes in (Counter(exact) - scaled.total()).items():
            embedding[part] = embedding.get(part, 0) + num_bytes
        return scaled


def estimate_sites(
    spec: ModelSpec, preset: QuantPreset, *, bytes_per_value: int, has_own_head: bool, mtp: bool = False
) -> WeightSites:
    """Bytes of the loaded weights of each site by part; `bytes_per_value` is the model's dtype's. With `mtp` the head
    for multi-token prediction stands with the embedding, as "draft".

    Biases of routed experts and of the head, which only some writers store, are not counted.
    """
    counting = _Counting(spec, preset, bytes_per_value)
    kinds = [spec.experts is not None and spec.experts.in_layer(layer) for layer in range(spec.num_layers)]
    # All dense layers are alike, and so are all with experts.
    layer = {kind: counting.layer(kind) for kind in set(kinds)}
    experts, active = counting.experts() if any(kinds) else ({}, 0)
    embedding = counting.matrix("embedding", spec.vocab_size, spec.hidden_size)
    if mtp:
        embedding["draft"] = counting.mtp()
    return WeightSites(
        embedding=embedding,
        layers=tuple(layer[kind] for kind in kinds),
        experts=tuple(experts if kind else {} for kind in kinds),
        active_experts=tuple(active if kind else 0 for kind in kinds),
        head=counting.head(has_own_head),
        vision=counting.vision(),
        has_own_head=has_own_head,
    )


def stored_weights(
    index: CheckpointIndex, *, bytes_per_value: int, has_own_head: bool, gptq: GptqConfig | None, mtp: bool = False
) -> PartBytes:
    """Bytes by part of loaded weights whose -PT files hold them quantised, in our own format or as `gptq` says: from
    the headers, and with GPTQ's `desc_act` from the groups of the inputs. Only with `mtp` is the head for multi-token
    prediction loaded, as "draft"."""
    counted: Counter[WeightPart] = Counter()
    orders: dict[str, list[bytes]] = {}
    for name, info in index.tensors.items():
        module, _, leaf = name.rpartition(".")
        part = _part_of(name)
        if part is None or (part == "head" and not has_own_head) or (part == "draft" and not mtp):
            continue
        scales: WeightPart = "draft" if part == "draft" else "scales"
        if leaf in ("codes", "qweight"):
            counted[part] += info.num_bytes
        elif leaf in ("scales", "row_scales", "zeros", "input_order"):
            counted[scales] += info.num_bytes
            if leaf == "scales" and gptq is not None and not gptq.is_symmetric:
                counted[scales] += math.prod(info.shape)  # a byte for each zero
        elif leaf == "panels":
            num_rows, num_groups = _panel_groups(info)
            counted[part] += num_rows * num_groups * INT4_GROUP // 2
            counted[scales] += num_rows * num_groups
        elif leaf == "g_idx" and info.dtype == "I32" and gptq is not None and gptq.reorders_inputs:
            orders.setdefault(_read_as_one(module), []).append(_read(info))
        elif leaf not in ("qzeros", "g_idx"):
            counted[part] += math.prod(info.shape) * (_FLOAT32_BYTES if part == "router" else bytes_per_value)
    for stored in orders.values():
        # Matrices that are read as one share the order of their inputs, if it is the same.
        each = stored[:1] if len(set(stored)) == 1 else stored
        counted["scales"] += sum(len(groups) for groups in each if not _is_sorted(groups))
    return counted


def _panel_groups(info: TensorInfo) -> tuple[int, int]:
    """How many rows, and groups in each, are in `PanelInt4.panels`."""
    if len(info.shape) != 4 or info.shape[2:] != (64, 4):
        raise TensorError(
            f"tensor {info.name!r} is stored as {info.dtype} {list(info.shape)}, which are no panels of 64 rows",
            hint="the files are damaged: save or fetch the folder again",
        )
    num_panels, num_dwords, panel_rows, _ = info.shape
    return num_panels * panel_rows, 4 * num_dwords // 17  # a dword of scales before the 16 of four groups


def add_parts(sites: Iterable[PartBytes]) -> Counter[WeightPart]:
    """Bytes by part of several sites together."""
    total: Counter[WeightPart] = Counter()
    for site in sites:
        total.update(site)
    return total


def _part_of(name: str) -> WeightPart | None:
    """The part that a stored -PT tensor is counted with; None where it is not loaded."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model.mtp_"):
        return "draft"
    return next((part for mark, part in _MARKS if mark in name), "norms")


def _read_as_one(module: str) -> str:
    """What a matrix's module has in common with those that are read as one matrix with it."""
    return re.sub(r"(?<=\.)([qkv]|gate|up)_proj$", lambda leaf: "qkv" if leaf[1] in "qkv" else "gate_up", module)


def _read(info: TensorInfo) -> bytes:
    with info.file.open("rb") as file:
        file.seek(info.start)
        return file.read(info.num_bytes)


def _is_sorted(groups: bytes) -> bool:
    """Whether int32 numbers do not fall."""
    numbers = memoryview(groups).cast("i").tolist()
    return numbers == sorted(numbers)


@dataclass(frozen=True, slots=True)
class _Counting:
    spec: ModelSpec
    preset: QuantPreset
    bytes_per_value: int

    def matrix(self, part: Part, out_features: int, in_features: int, *, has_bias: bool = False) -> Counter[WeightPart]:
        scheme = self.preset.scheme(part, in_features)
        bias = out_features * self.bytes_per_value if has_bias else 0
        codes = code_bytes(scheme, out_features, in_features, self.bytes_per_value) + bias
        return Counter({part: codes, "scales": scale_bytes(scheme, out_features, in_features)})

    def mlp(self, part: Part, width: int, *, has_bias: bool) -> Counter[WeightPart]:
        """Gate and up projections are one matrix."""
        hidden = self.spec.hidden_size
        gate_up = self.matrix(part, 2 * width, hidden, has_bias=has_bias)
        return gate_up + self.matrix(part, hidden, width, has_bias=has_bias)

    def layer(self, has_experts: bool) -> PartBytes:
        """A layer without its routed experts. Query, key and value projections are one matrix."""
        spec, hidden, biases = self.spec, self.spec.hidden_size, self.spec.use_bias
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        counted: Counter[WeightPart] = Counter({"norms": 2 * hidden * self.bytes_per_value})
        counted += self.matrix("attention", query + 2 * key, hidden, has_bias=biases)
        counted += self.matrix("attention", hidden, query, has_bias=biases)
        if not has_experts:
            return counted + self.mlp("dense_mlp", spec.intermediate_size, has_bias=biases)
        experts = spec.experts
        assert experts is not None
        if experts.num_shared_experts:
            width = experts.num_shared_experts * experts.intermediate_size
            counted += self.mlp("shared_experts", width, has_bias=biases)
        for bank in self._banks():
            counted["router"] += _FLOAT32_BYTES * bank.num_experts * (hidden + experts.has_correction_bias)
        return counted

    def experts(self) -> tuple[PartBytes, int]:
        """The routed experts of a layer, and the bytes of those that a text token goes through."""
        counted: Counter[WeightPart] = Counter()
        for bank in self._banks():
            expert = self.mlp("routed_experts", bank.intermediate_size, has_bias=False)
            counted.update({part: bank.num_experts * num_bytes for part, num_bytes in expert.items()})
        text = self._banks()[0]
        expert = self.mlp("routed_experts", text.intermediate_size, has_bias=False)
        return counted, text.experts_per_token * expert.total()

    def head(self, has_own_head: bool) -> PartBytes:
        spec = self.spec
        norm: Counter[WeightPart] = Counter({"norms": spec.hidden_size * self.bytes_per_value})
        return norm + self.matrix("head", spec.vocab_size, spec.hidden_size) if has_own_head else norm

    def mtp(self) -> int:
        """A dense layer, the projection to it of an embedding and a state, and the norms of these two."""
        hidden = self.spec.hidden_size
        projection = self.matrix("dense_mlp", hidden, 2 * hidden, has_bias=self.spec.use_bias)
        return sum(self.layer(False).values()) + projection.total() + 2 * hidden * self.bytes_per_value

    def vision(self) -> PartBytes:
        """Tower and resampler, which no preset covers."""
        vision = self.spec.vision
        if vision is None:
            return {}
        values = count_vision_tower(vision) + count_resampler(vision, hidden_size=self.spec.hidden_size)
        return {"vision": values * self.bytes_per_value}

    def _banks(self) -> list[ExpertSpec]:
        assert self.spec.experts is not None
        return [self.spec.experts] if self.spec.vision is None else [self.spec.experts, self.spec.vision.experts]


def _scaled(site: PartBytes, estimated: PartBytes, exact: PartBytes) -> PartBytes:
    return {part: share(num_bytes, part, estimated, exact) for part, num_bytes in site.items()}


def share(num_bytes: int, part: WeightPart, estimated: PartBytes, exact: PartBytes) -> int:
    """What so many bytes of a part are, where all of it was `estimated` and has `exact` bytes."""
    return num_bytes * exact.get(part, 0) // estimated[part] if estimated.get(part) else 0
