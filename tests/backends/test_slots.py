"""Where streamed experts lie: those in panels in the slots that they were read into, others copied there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45 import ErnieModel
from ernie45.backends.decoder import DenseMLP
from ernie45.backends.weights import WeightBuilder
from ernie45.checkpoint import large_pages, staged_reads
from ernie45.checkpoint.staged_reads import BLOCK_BYTES
from ernie45.kernels.panels import PanelMemory
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from ernie45.spec import ExpertSpec
from tests.backends.test_streamed import LONG, MOE, WIDE, caches_of, check_streams
from tests.packed_files import as_version_1, move_data, opened
from tests.paddle_files import random_pt, write_checkpoint
from tests.streamed_models import open_model, tiny


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each buffer that a reader takes for itself."""
    taken: list[int] = []
    mapped = large_pages.map_large_pages

    def counting(num_bytes: int, purpose: str) -> Any:
        taken.append(num_bytes)
        return mapped(num_bytes, purpose)

    monkeypatch.setattr(staged_reads, "map_large_pages", counting)
    return taken


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-moe in int4."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    save_checkpoint(tiny("tiny-moe"), folder, PRESETS["int4"], progress=False)
    return folder


def check_slots(model: ErnieModel) -> None:
    """All experts that are in memory lie in their slots, and no two in one."""
    for cache in caches_of(model):
        memory = cache._fill._memory  # type: ignore[attr-defined]
        assert memory.data_ptr() % BLOCK_BYTES == memory.stride(0) % BLOCK_BYTES == 0
        assert len(set(cache._slots.values())) == len(cache._filled) == cache.num_slots
        for key, filled in cache._filled.items():
            slot, expert = memory[cache._slots[key]], filled.result()
            for linear in (expert.gate_up, expert.down):
                addresses = linear.struct.panels, linear.struct.row_scales
                for address, tensor in zip(addresses, linear._kept, strict=True):
                    assert tensor is None or 0 <= address - slot.data_ptr() <= slot.nbytes - tensor.nbytes


@pytest.mark.parametrize("offset", [0, 8, 4088])
def test_experts_in_panels_are_read_into_their_slots(
    native: object, packed: Path, tmp_path: Path, offset: int, buffers: list[int]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    move_data(folder, offset)
    with open_model(packed, None, quantization="auto", context_tokens=640) as model:
        expected = model.logits(LONG)
    with open_model(folder, 5, quantization="auto", context_tokens=640) as model:
        assert torch.equal(model.logits(LONG), expected)
        check_slots(model)
        (cache,) = caches_of(model)
        memory, tensors = cache._fill._memory, opened(folder).index.tensors  # type: ignore[attr-defined]
        for key, filled in cache._filled.items():
            layer, number = divmod(key, 8)
            stored = tensors[f"model.layers.{layer}.mlp.experts.{number}.gate_up_proj.panels"]
            begin = memory[cache._slots[key]].data_ptr() + stored.start % BLOCK_BYTES
            assert filled.result().gate_up.struct.panels == begin, "not where it was read to"
    assert not buffers


def test_what_follows_in_a_slot_is_not_built_again(
    native: object, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building takes the processor from the layers; where an expert lies is all that is new."""
    built: list[str] = []
    build = WeightBuilder.expert

    def counting(builder: WeightBuilder, prefix: str, experts: ExpertSpec, memory: PanelMemory | None) -> DenseMLP:
        built.append(prefix)
        return build(builder, prefix, experts, memory)

    with open_model(packed, 5, quantization="auto", context_tokens=640) as model:
        monkeypatch.setattr(WeightBuilder, "expert", counting)
        model.logits(LONG)
        (cache,) = caches_of(model)
        assert len(built) <= cache.num_slots
        assert cache.counts.misses > 3 * cache.num_slots


def test_gate_and_up_that_lie_apart_are_built_each_time(native: object, packed: Path, tmp_path: Path) -> None:
    """A folder of another writer: the kernels take them one by one, and none follows another."""
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if ".experts." in name and "gate_up_proj" in name]:
        gate, up = stored.pop(name).chunk(2)
        for part, tensor in (("gate_proj", gate), ("up_proj", up)):
            stored[name.replace("gate_up_proj", part)] = tensor.contiguous()
    save_file(stored, folder / "model.safetensors")
    check_streams(folder, 5, quantization="auto")


@pytest.mark.parametrize("kind", ["version 1", "int8", "none", "int4 while loading"])
def test_what_is_stored_otherwise_is_copied_there(
    native: object, packed: Path, tmp_path: Path, kind: str, buffers: list[int]
) -> None:
    source, preset = tiny("tiny-moe"), kind.split()[0]
    if kind == "version 1":
        source, preset = as_version_1(packed, tmp_path / "old"), "auto"
    if kind == "int8":
        source = tmp_path / "int8"
        save_checkpoint(tiny("tiny-moe"), source, PRESETS["int8"], progress=False)
    with open_model(source, None, quantization=preset) as model:
        expected = model.logits(LONG[:40])
    with open_model(source, 5, quantization=preset) as model:
        assert torch.equal(model.logits(LONG[:40]), expected)
        check_slots(model)
    assert buffers


def test_biases_lie_beside_the_slots(native: object, tmp_path: Path, buffers: list[int]) -> None:
    biased = {**WIDE, "use_bias": True}
    write_checkpoint(tmp_path / "plain", random_pt(biased, expert_biases=True), biased, layout="pt", dtype="BF16")
    save_checkpoint(tmp_path / "plain", tmp_path / "packed", PRESETS["int4"], progress=False)
    check_streams(tmp_path / "packed", 3, quantization="auto", dtype="bfloat16")
    assert buffers


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("version", [1, 2])
def test_without_native_kernels_nothing_lies_in_slots(
    packed: Path, tmp_path: Path, version: int, buffers: list[int]
) -> None:
    with open_model(MOE, None, quantization="int4") as model:
        expected = model.logits(LONG[:40])
    folder = as_version_1(packed, tmp_path / "old") if version == 1 else packed
    with open_model(folder, 5, quantization="auto") as model:
        assert torch.equal(model.logits(LONG[:40]), expected)
        (cache,) = caches_of(model)
        assert not cache._fill._memory.any()  # type: ignore[attr-defined]
    assert buffers


def test_in_float16_panels_are_put_into_rows(native: object, packed: Path, tmp_path: Path, buffers: list[int]) -> None:
    check_streams(packed, 5, quantization="auto", dtype="float16")
    assert buffers
