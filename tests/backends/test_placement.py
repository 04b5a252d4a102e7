"""Decoders whose parts lie on several devices: "cpu:0", "cpu:1", … are names for one memory, so that a split can be
compared bit for bit, and what works on which device can be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ernie45.backends.base import Batch, BuildOptions, VisionTokens
from ernie45.backends.decoder import DenseMLP, ExpertMLP, NormedHead, ResidentExperts, Stage
from ernie45.backends.kv_cache import DenseStore, KVCache
from ernie45.backends.text import TextBackend, build_text
from ernie45.backends.vision_language import VisionLanguageBackend, build_vision_language
from ernie45.backends.weights import WeightBuilder
from ernie45.kernels.linear import DenseEmbedding, DenseLinear, Linear
from ernie45.memory.budget import KVDtype
from ernie45.presets import PRESETS
from ernie45.spec import ModelSpec
from ernie45.types.placement import Placement
from tests.backends import test_vision_language as vision
from tests.backends.test_text import EXPERTS, RandomTensors, batch_of, spec


class MixedDevicesError(Exception):
    pass


class DeviceWatch(TorchFunctionMode):
    """While it is on, a tensor is on the device that it was made on or moved to by name, even "cpu:1", and an operation
    on tensors of several devices fails as it would if they were real. `named` are the devices asked for by name."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[torch.device] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return device_of(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        named = [leaf for leaf in (*args, kwargs.get("device")) if isinstance(leaf, torch.device)]
        devices = {device_of(tensor) for tensor in tensors}
        if named:
            device = named[0]
            self.named.add(device)
        elif func == torch.Tensor.copy_:
            device = device_of(args[0])
        elif len(devices) > 1:
            raise MixedDevicesError(f"{func.__name__} got tensors on {sorted(map(str, devices))}")
        else:
            device = next(iter(devices), torch.device("cpu"))
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                leaf.watched_device = device  # type: ignore[attr-defined]
        return result


def device_of(tensor: Tensor) -> torch.device:
    device: torch.device = getattr(tensor, "watched_device", torch.device("cpu"))
    return device


def test_the_watch_tells_devices_apart() -> None:
    zero, one = torch.device("cpu", 0), torch.device("cpu", 1)
    with DeviceWatch():
        x, y = torch.ones(3, device=zero), torch.ones(3, 3, device=one)
        assert (x.to(one) + y[0]).device == one
        assert torch.cat((x, x.float())).device == x.new_empty(2).device == zero
        with pytest.raises(MixedDevicesError, match=r"add got tensors on .*cpu:0.*cpu:1"):
            x + y
        with pytest.raises(MixedDevicesError, match="__getitem__"):
            y[x.long()]
        with pytest.raises(MixedDevicesError, match="cat"):
            torch.cat((y[0], x))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its placement; `head` says whether the files hold an output head of its own."""

    shape: ModelSpec
    placement: Placement
    head: bool = False
    preset: str = "none"
    kv_dtype: KVDtype = "auto"


def placed(layers: str, experts: str = "", *, embedding: int, head: int, tower: int = 0) -> Placement:
    """Numbers of CPU devices, a digit a layer; experts with their layer where nothing is said."""
    return Placement(
        embedding=f"cpu:{embedding}",
        layers=tuple(f"cpu:{number}" for number in layers),
        experts=tuple(f"cpu:{number}" for number in experts or layers),
        head=f"cpu:{head}",
        vision=f"cpu:{tower}",
    )


DENSE, MOE = spec(num_hidden_layers=3), spec(**EXPERTS, num_hidden_layers=3)
VL = vision.spec(num_hidden_layers=3)
CASES = {
    "one device": Case(shape=MOE, placement=placed("111", embedding=1, head=1)),
    "dense, tied": Case(shape=DENSE, placement=placed("001", embedding=0, head=1)),
    "dense, int8": Case(shape=DENSE, placement=placed("011", embedding=0, head=1), preset="int8", kv_dtype="int8"),
    "dense, head of its own": Case(shape=DENSE, placement=placed("122", embedding=0, head=3), head=True),
    "there and back": Case(shape=DENSE, placement=placed("010", embedding=0, head=0)),
    "experts elsewhere": Case(shape=MOE, placement=placed("111", "000", embedding=0, head=1)),
    "experts of one layer elsewhere": Case(shape=MOE, placement=placed("011", "010", embedding=0, head=1)),
    "pictures": Case(shape=VL, placement=placed("011", "002", embedding=0, head=1, tower=3)),
}


class Stored(RandomTensors):
    """Gives a tensor the same values in whatever order it is asked for."""

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, "".join(parts))))
        out.copy_(torch.randn(out.shape, generator=generator) * (0.5 if out.dim() == 1 else 0.1))


def build(case: Case, dtype: torch.dtype = torch.float32) -> TextBackend | VisionLanguageBackend:
    options = BuildOptions(dtype=dtype, placement=case.placement, preset=PRESETS[case.preset], context_tokens=64)
    source = Stored(*["lm_head.weight"] * case.head)
    return (build_text if case.shape.vision is None else build_vision_language)(case.shape, source, options)


def allocate(case: Case, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(
        case.shape,
        num_slots=2,
        context_tokens=64,
        dtype=dtype,
        kv_dtype=case.kv_dtype,
        placement=case.placement,
    )


def logits(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of two rows' prompts, the second with a picture where the model sees, and of a step that decodes both."""
    backend, cache = build(case, dtype), allocate(case, dtype)
    rows = ({0: ([5, 6, 7], 0)}, {1: (list(range(20)), 0)}, {0: ([8], 3), 1: ([9], 20)})
    batches = [batch_of(parts, cache) for parts in rows]
    if isinstance(backend, VisionLanguageBackend):
        batches[1] = with_picture(batches[1], backend)
    return [backend.forward(batch.to(backend.device)).logits for batch in batches]


def with_picture(batch: Batch, backend: VisionLanguageBackend) -> Batch:
    """The same with a picture of 4 tokens from token 6 on."""
    features = backend.encode(vision.patches(1, 4, 4), (1, 4, 4))
    assert features.device == backend.device
    tokens = VisionTokens(
        text=torch.tensor([*range(6), *range(10, 20)]),
        routed=torch.arange(6, 10),
        embedded=torch.arange(6, 10),
        features=features.to(torch.device("cpu")),
    )
    return replace(batch, vision=tokens, rotary_positions=batch.positions[:, None].expand(-1, 3).contiguous())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("without_library")
def test_a_split_gives_the_bits_of_one_device_and_every_tensor_is_moved_where_it_is_used(name: str) -> None:
    case = CASES[name]
    expected = logits(replace(case, placement=Placement.on("cpu", case.shape.num_layers)))
    with DeviceWatch():
        split = logits(case)
        assert {tensor.device for tensor in split} == {torch.device(case.placement.head)}
    for one, other in zip(split, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
@pytest.mark.parametrize(("shape", "layers", "experts"), [(DENSE, "010", ""), (MOE, "011", "010"), (MOE, "000", "111")])
@pytest.mark.usefixtures("native")
def test_a_split_gives_the_bits_of_one_device_on_the_native_kernels(
    shape: ModelSpec, layers: str, experts: str, preset: str, kv_dtype: KVDtype
) -> None:
    placement = placed(layers, experts, embedding=0, head=0)
    case = Case(shape=shape, placement=placement, preset=preset, kv_dtype=kv_dtype)
    whole = replace(case, placement=Placement.on("cpu", case.shape.num_layers))
    for one, other in zip(logits(case, torch.bfloat16), logits(whole, torch.bfloat16), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("without_library")
def test_a_forgotten_move_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["dense, tied"]
    monkeypatch.setattr(Batch, "to", lambda batch, device: batch)
    with DeviceWatch(), pytest.raises(MixedDevicesError):
        logits(case)


def test_on_one_device_nothing_is_moved_or_copied() -> None:
    batch = batch_of({0: ([5, 6], 0)}, KVCache(keys=(), values=()))
    assert batch.to(torch.device("cpu")) is batch


def weights_of(part: DenseMLP | Linear) -> Iterable[Tensor]:
    if isinstance(part, DenseMLP):
        return [*weights_of(part.gate_up), *weights_of(part.down)]
    assert isinstance(part, DenseLinear)
    return [part.weight]


@pytest.mark.parametrize("name", ["dense, tied", "experts of one layer elsewhere", "pictures"])
@pytest.mark.usefixtures("without_library")
def test_each_part_is_built_on_its_device(name: str) -> None:
    case = CASES[name]
    options = BuildOptions(dtype=torch.float32, placement=case.placement, preset=PRESETS["none"], context_tokens=64)
    lies: dict[str, set[str]] = {}

    def note(part: str, *tensors: Tensor) -> None:
        lies.setdefault(part, set()).update(str(device_of(tensor)) for tensor in tensors)

    with DeviceWatch():
        decoder = WeightBuilder(case.shape, Stored(), options).decoder()
        assert isinstance(decoder.embedding, DenseEmbedding)
        note("embedding", decoder.embedding.weight)
        assert isinstance(decoder.head, NormedHead)
        note("head", decoder.head.norm.weight, *weights_of(decoder.head.linear))
        for stage in decoder.stages:
            assert isinstance(stage, Stage)
            for number, layer in enumerate(stage.layers, stage.first):
                note(f"layer {number}", stage.rotary.cos, layer.attention_norm.weight, layer.mlp_norm.weight)
                note(f"layer {number}", *weights_of(layer.attention.qkv), *weights_of(layer.attention.out))
                if isinstance(layer.mlp, ExpertMLP):
                    assert layer.mlp.shared is not None
                    note(f"layer {number}", *weights_of(layer.mlp.shared), layer.mlp.text.router.weight)
                    for bank in (layer.mlp.text, layer.mlp.vision or layer.mlp.text):
                        assert isinstance(bank.experts, ResidentExperts)
                        note(f"experts {number}", *(w for expert in bank.experts.experts for w in weights_of(expert)))
                else:
                    note(f"layer {number}", *weights_of(layer.mlp))

    where = case.placement
    expected = {"embedding": {where.embedding}, "head": {where.head}}
    expected |= {f"layer {number}": {device} for number, device in enumerate(where.layers)}
    expected |= {
        f"experts {number}": {device}
        for number, device in enumerate(where.experts)
        if case.shape.experts is not None and case.shape.experts.in_layer(number)
    }
    assert lies == expected


def test_keys_and_values_lie_with_their_layer() -> None:
    with DeviceWatch():
        cache = allocate(CASES["dense, tied"])
    for stores in (cache.keys, cache.values):
        devices = [str(device_of(store.x)) for store in stores if isinstance(store, DenseStore)]
        assert devices == ["cpu:0", "cpu:0", "cpu:1"]


@pytest.mark.parametrize("preset", ["none", "int8"])
def test_a_tied_head_on_another_device_is_a_copy_and_counted(preset: str) -> None:
    apart = build(Case(shape=DENSE, placement=placed("000", embedding=0, head=1), preset=preset)).weight_bytes
    together = build(Case(shape=DENSE, placement=placed("000", embedding=0, head=0), preset=preset)).weight_bytes
    size = 300 * 256 * (4 if preset == "none" else 1)
    assert together["embedding"] == apart["embedding"] == apart["head"] == size
    assert together.get("head", 0) == 0
    assert apart["scales"] - together["scales"] == (0 if preset == "none" else 300 * 4)
