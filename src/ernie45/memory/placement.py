"""Which device gets which part of a model: a function of sizes, capacities and bandwidths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ernie45.memory.estimate import WeightSites
from ernie45.types.placement import Placement

# Bytes a second, only to compare devices: two channels of DDR4-3200 (JEDEC JESD79-4: 2 · 25.6 GB/s), a GeForce RTX 3090
# (NVIDIA: 936 GB/s), an Apple M3 Pro (Apple: 150 GB/s).
NOMINAL_RATES: Mapping[str, float] = MappingProxyType({"cpu": 51.2e9, "cuda": 936e9, "mps": 150e9})


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """A device, such as "cuda:0" or "cpu", and the bytes of it that may be used."""

    name: str
    capacity_bytes: int

    @property
    def kind(self) -> str:
        """ "cpu", "cuda" or "mps"."""
        return self.name.partition(":")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """What running needs beside weights: on every device in use `runtime_bytes`, and the larger of `loading_bytes`,
    for a moment, and `workspace_bytes` with the KV cache; that is `kv_layer_bytes` for each layer. A token reads
    `kv_read_bytes` of each layer's. What guesses has `draft_kv_bytes` beside the embedding."""

    kv_layer_bytes: int
    kv_read_bytes: int
    workspace_bytes: int
    loading_bytes: int
    runtime_bytes: int
    draft_kv_bytes: int = 0


def within_host(devices: Sequence[DeviceMemory], host_bytes: int) -> tuple[DeviceMemory, ...]:
    """The devices, those that are CPUs together with no more than `host_bytes`: a process that takes more is killed."""
    held = []
    for device in devices:
        if device.kind == "cpu":
            device = replace(device, capacity_bytes=min(device.capacity_bytes, host_bytes))
            host_bytes -= device.capacity_bytes
        held.append(device)
    return tuple(held)


def place(sites: WeightSites, devices: Sequence[DeviceMemory], running: Running) -> Placement:
    """Put the parts on devices, in the order of the work: the first is filled before the second is begun, and the last
    takes what is left, whether it fits or not.

    Where a CPU comes last, either whole layers go to it, or only routed experts, which it computes itself: what lies
    over the capacity by less, else what reads its weights faster.
    """
    if len(devices) == 1:
        return Placement.on(devices[0].name, len(sites.layers))
    ways = [_whole_layers(sites, devices, running)]
    if devices[-1].kind == "cpu" and any(sites.active_experts):
        ways.append(_experts_apart(sites, devices, running))
    return min(
        ways,
        key=lambda placement: (
            excess_bytes(placement, sites, devices, running),
            token_seconds(placement, sites, running),
        ),
    )


def read_bytes(placement: Placement, sites: WeightSites, running: Running) -> dict[str, int]:
    """Bytes that each device reads to make one token: its weights, of the experts those in use, and the KV cache.

    Of an embedding that is not the head only one row is read, which is not counted.
    """
    head = sites.head if sites.has_own_head else sites.embedding
    read = dict.fromkeys(placement.devices, 0)
    read[placement.head] += sum(head.values())
    for index, layer in enumerate(sites.layers):
        read[placement.layers[index]] += sum(layer.values()) + running.kv_read_bytes
        read[placement.experts[index]] += sites.active_experts[index]
    return read


@dataclass(slots=True)
class _Filling:
    """A device while it is being filled: bytes of weights and of KV cache on it."""

    device: DeviceMemory
    running: Running
    weight_bytes: int = 0
    kv_bytes: int = 0

    def excess(self, weight_bytes: int = 0, kv_bytes: int = 0) -> int:
        """Bytes over the capacity, with this on it as well; below 0 where it fits."""
        running = self.running
        used = max(self.kv_bytes + kv_bytes + running.workspace_bytes, running.loading_bytes)
        return self.weight_bytes + weight_bytes + running.runtime_bytes + used - self.device.capacity_bytes

    def add(self, weight_bytes: int, kv_bytes: int = 0) -> str:
        self.weight_bytes += weight_bytes
        self.kv_bytes += kv_bytes
        return self.device.name


@dataclass(slots=True)
class _Row:
    """Devices that are filled one after the other."""

    fillings: list[_Filling]
    current: int = field(default=0)

    def add(self, weight_bytes: int, kv_bytes: int = 0) -> str:
        """Put it on the first device from the current one on that has room, else on the last."""
        while self.current < len(self.fillings) - 1 and self.fillings[self.current].excess(weight_bytes, kv_bytes) > 0:
            self.current += 1
        return self.fillings[self.current].add(weight_bytes, kv_bytes)

    def named(self, name: str) -> _Filling:
        return next(filling for filling in self.fillings if filling.device.name == name)


def _whole_layers(sites: WeightSites, devices: Sequence[DeviceMemory], running: Running) -> Placement:
    experts = [sum(site.values()) for site in sites.experts]
    placement, _ = _in_order(sites, devices, running, experts)
    return placement


def _experts_apart(sites: WeightSites, devices: Sequence[DeviceMemory], running: Running) -> Placement:
    """First all but the experts; then the experts of each layer beside it where there is room, else on the last."""
    nothing = [0] * len(sites.layers)
    placement, row = _in_order(sites, devices, running, nothing)
    names = []
    for layer, site in zip(placement.layers, sites.experts, strict=True):
        num_bytes = sum(site.values())
        here = row.named(layer)
        names.append((row.fillings[-1] if here.excess(num_bytes) > 0 else here).add(num_bytes))
    return Placement(
        embedding=placement.embedding,
        layers=placement.layers,
        experts=tuple(names),
        head=placement.head,
        vision=placement.vision,
    )


def _in_order(
    sites: WeightSites, devices: Sequence[DeviceMemory], running: Running, experts: Sequence[int]
) -> tuple[Placement, _Row]:
    """Embedding and vision, layers with so many bytes of `experts`, head; a tied head stays with the embedding."""
    row = _Row([_Filling(device, running) for device in devices])
    head_bytes = sum(sites.head.values())
    first_bytes = sum(sites.vision.values()) + sum(sites.embedding.values())
    first = row.add(first_bytes if sites.has_own_head else first_bytes + head_bytes, running.draft_kv_bytes)
    layers = tuple(
        row.add(sum(layer.values()) + experts[index], running.kv_layer_bytes)
        for index, layer in enumerate(sites.layers)
    )
    head = row.add(head_bytes) if sites.has_own_head else first
    return Placement(embedding=first, layers=layers, experts=layers, head=head, vision=first), row


def excess_bytes(placement: Placement, sites: WeightSites, devices: Sequence[DeviceMemory], running: Running) -> int:
    """Bytes over the capacities, of all devices together."""
    row = {device.name: _Filling(device, running) for device in devices}
    for name, weight_bytes, kv_bytes in _held(placement, sites, running):
        row[name].add(weight_bytes, kv_bytes)
    return sum(max(row[name].excess(), 0) for name in placement.devices)


def _held(placement: Placement, sites: WeightSites, running: Running) -> Iterator[tuple[str, int, int]]:
    """Device, bytes of weights and of KV cache of each site."""
    yield placement.embedding, sum(sites.embedding.values()), running.draft_kv_bytes
    yield placement.vision, sum(sites.vision.values()), 0
    yield placement.head, sum(sites.head.values()), 0
    for index, layer in enumerate(sites.layers):
        yield placement.layers[index], sum(layer.values()), running.kv_layer_bytes
        yield placement.experts[index], sum(sites.experts[index].values()), 0


def token_seconds(placement: Placement, sites: WeightSites, running: Running) -> float:
    """Time to read what one token needs at nominal rates, to compare placements by."""
    read = read_bytes(placement, sites, running)
    return sum(num_bytes / NOMINAL_RATES[name.partition(":")[0]] for name, num_bytes in read.items())
