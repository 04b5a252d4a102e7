"""Experts that are read as they are chosen give what experts in memory give, bit for bit, wherever they come from."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ernie45 import ErnieModel, plan_memory
from ernie45.experts.cache import ExpertCache
from ernie45.presets import PRESETS
from ernie45.saving import save_checkpoint
from ernie45.testing.tasks import tasks
from ernie45.types.streaming import ExpertSlots
from tests.gptq_files import write_gptq_folder
from tests.paddle_files import CONFIG, EXPERTS, random_pt, write_checkpoint
from tests.streamed_models import open_model, tiny
from tests.test_loading import write_adapter

MOE, VL = "ernie45/tiny-moe", "ernie45/tiny-vl"
WIDE: dict[str, Any] = {
    **CONFIG, **EXPERTS, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "moe_intermediate_size": 64,
}  # fmt: skip
ROOMY: dict[str, Any] = {"context_tokens": 640, "max_batch": 4}
LONG = [(7 * i + i * i) % 1900 + 3 for i in range(600)]  # longer than a chunk
PROMPTS = [LONG[10:13], LONG, LONG[30:75], LONG[5:6], LONG[100:230], LONG[200:217]]
EXPERTS_IN_ALL = 3 * 8


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says to `PROMPTS`, alone and together."""

    logits: torch.Tensor
    greedy: list[tuple[int, ...]]
    drawn: list[tuple[int, ...]]
    alone: tuple[int, ...]

    @staticmethod
    def of(model: ErnieModel) -> Answers:
        options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
        return Answers(
            logits=model.logits(LONG),
            greedy=[reply.token_ids for reply in model.batch_generate(PROMPTS, temperature=0, **options)],
            drawn=[reply.token_ids for reply in model.batch_generate(PROMPTS, temperature=1, seed=5, **options)],
            alone=model.generate(PROMPTS[2], temperature=0, **options).token_ids,
        )

    def check(self, other: Answers) -> None:
        assert torch.equal(self.logits, other.logits)
        assert (self.greedy, self.drawn, self.alone) == (other.greedy, other.drawn, other.alone)


@cache
def resident(preset: str) -> Answers:
    with open_model(MOE, None, quantization=preset, **ROOMY) as model:
        return Answers.of(model)


@pytest.mark.parametrize(
    ("preset", "slots"),
    [("none", 4), ("int8", 4), ("int4", 2), ("int4", 5), ("int4", 12), ("int4", 23), ("int4", EXPERTS_IN_ALL)],
)
def test_a_mixture_of_experts(native: object, preset: str, slots: int) -> None:
    with open_model(MOE, slots, quantization=preset, **ROOMY) as model:
        Answers.of(model).check(resident(preset))
        counts = model.stats.experts
        assert counts is not None
        assert counts.misses > 0
        assert (counts.misses + counts.guesses <= EXPERTS_IN_ALL) == (slots == EXPERTS_IN_ALL)
        assert counts.read_bytes > 0


def answers(model: ErnieModel, length: int = 40) -> tuple[torch.Tensor, tuple[int, ...]]:
    ids = [i % model.spec.vocab_size for i in LONG[:length]]
    return model.logits(ids), model.generate(ids, max_new_tokens=8, temperature=0, ignore_eos=True).token_ids


def check_streams(source: Path | str, slots: int, **options: Any) -> None:
    with open_model(source, None, **options) as model:
        expected = answers(model)
    with open_model(source, slots, **options) as model:
        found = answers(model)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
        counts = model.stats.experts
        assert counts is not None
        assert counts.misses > slots


@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_in_float32(preset: str) -> None:
    check_streams(MOE, 5, quantization=preset, dtype="float32")


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_without_native_kernels(preset: str) -> None:
    check_streams(MOE, 5, quantization=preset)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    for preset in ("int8", "int4"):
        save_checkpoint(tiny("tiny-moe"), folder / preset, PRESETS[preset], progress=False)
    return {preset: folder / preset for preset in ("int8", "int4")}


@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_packed_folder(native: object, packed: Mapping[str, Path], preset: str) -> None:
    with open_model(packed[preset], 5, quantization="auto", **ROOMY) as model:
        Answers.of(model).check(resident(preset))


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize("preset", ["int8", "int4"])
def test_a_packed_folder_without_native_kernels(packed: Mapping[str, Path], preset: str) -> None:
    check_streams(packed[preset], 5, quantization="auto")


@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
@pytest.mark.parametrize("layout", ["paddle", "paddleformers"])
def test_a_folder_in_paddles_layout(tmp_path: Path, layout: Any, preset: str) -> None:
    write_checkpoint(tmp_path, random_pt(WIDE), WIDE, layout=layout, dtype="BF16", num_shards=3)
    check_streams(tmp_path, 3, quantization=preset, dtype="bfloat16")


@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_experts_with_biases(tmp_path: Path, preset: str) -> None:
    biased = {**WIDE, "use_bias": True}
    write_checkpoint(tmp_path, random_pt(biased, expert_biases=True), biased, layout="pt", dtype="BF16")
    check_streams(tmp_path, 3, quantization=preset, dtype="bfloat16")


@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 96},
        {"hidden_size": 96, "head_dim": 16},
        {"moe_intermediate_size": 96, "hidden_size": 160},
        {"moe_intermediate_size": 20},
    ],
    ids=str,
)
def test_shapes_that_are_no_whole_panels(tmp_path: Path, shape: dict[str, int], preset: str) -> None:
    odd = {**WIDE, **shape}
    write_checkpoint(tmp_path / "plain", random_pt(odd), odd, layout="pt", dtype="BF16")
    check_streams(tmp_path / "plain", 3, quantization=preset, dtype="bfloat16")
    if preset != "none":
        save_checkpoint(tmp_path / "plain", tmp_path / "packed", PRESETS[preset], progress=False)
        check_streams(tmp_path / "packed", 3, quantization="auto", dtype="bfloat16")


@pytest.mark.parametrize("order", ["stored", "shared", "separate"])
def test_a_gptq_folder(tmp_path: Path, order: Any) -> None:
    write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt")
    write_gptq_folder(tmp_path / "plain", tmp_path / "gptq", tmp_path / "reference", order=order)
    check_streams(tmp_path / "gptq", 3, quantization="auto", dtype="bfloat16")


@pytest.mark.parametrize("preset", ["none", "int4"])
def test_an_adapter(tmp_path: Path, preset: str) -> None:
    draw = torch.Generator().manual_seed(3)
    factors = torch.randn(2, 256, generator=draw), torch.randn(128, 2, generator=draw)
    adapter = write_adapter(tmp_path / "adapter", "model.layers.2.mlp.experts.3.up_proj", *factors)
    check_streams(MOE, 5, quantization=preset, adapter=str(adapter))


@pytest.mark.parametrize("preset", ["none", "int4"])
@pytest.mark.parametrize("slots", [2, 6, 12])
def test_pictures_and_text(native: object, slots: int, preset: str) -> None:
    conversations = [
        task.messages for name in ("shape", "facts", "count") for task in tasks(name, 1, seed=3, split="test")
    ]
    options: dict[str, Any] = {"temperature": 0, "logprobs": 5, "max_new_tokens": 8}
    found = []
    for held in (None, ExpertSlots(text=slots, vision=slots)):
        with open_model(VL, held, quantization=preset, context_tokens=512, max_batch=3) as model:
            found.append([(reply.text, reply.logprobs) for reply in model.batch_chat(conversations, **options)])
            found[-1] += [(reply.text, reply.logprobs) for reply in [model.chat(conversations[0], **options)]]
            if held is not None:
                assert [cache.counts.misses > 0 for cache in model._loaded.expert_caches] == [True, True]
    assert found[0] == found[1]


def test_a_saved_gptq_model(tmp_path: Path) -> None:
    """Whose matrices are packed, but not in panels."""
    write_checkpoint(tmp_path / "plain", random_pt(WIDE), WIDE, layout="pt")
    write_gptq_folder(tmp_path / "plain", tmp_path / "gptq", tmp_path / "reference", symmetric=False)
    with open_model(tmp_path / "gptq", None, quantization="auto", dtype="bfloat16") as model:
        model.save_pretrained(tmp_path / "packed", progress=False)
    check_streams(tmp_path / "packed", 3, quantization="auto", dtype="bfloat16")


@pytest.mark.parametrize("draft", ["lookup", "mtp"])
def test_guessed_tokens(native: object, draft: str) -> None:
    with open_model(MOE, 5, quantization="int4", draft=draft, **ROOMY) as model:
        Answers.of(model).check(resident("int4"))


def test_two_models_at_once(native: object) -> None:
    with (
        open_model(MOE, 4, quantization="int4", **ROOMY) as first,
        open_model(MOE, 6, quantization="int8", **ROOMY) as second,
    ):
        found: dict[str, Answers] = {}
        threads = [
            threading.Thread(target=lambda name=name, model=model: found.update({name: Answers.of(model)}))
            for name, model in (("int4", first), ("int8", second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for preset in ("int4", "int8"):
        found[preset].check(resident(preset))


# How it is loaded, and what remains


def plan_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count what a tiny model has, without what any process takes."""
    for name in ("loading_bytes", "workspace_bytes", "reading_bytes"):
        monkeypatch.setattr(f"ernie45.memory.sizing.{name}", lambda *shape, **more: 0)
    monkeypatch.setattr("ernie45.memory.sizing.RUNTIME_BYTES", 0)
    monkeypatch.setattr("ernie45.memory.streaming._IMPORT_BYTES", 0)
    monkeypatch.setattr("ernie45.memory.streaming._MARGIN_SHARE", 0)


@pytest.mark.parametrize("name", [MOE, VL])
def test_a_limit_is_all_that_is_said(native: object, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plan_small(monkeypatch)
    asked: dict[str, Any] = {"quantization": "int4", "context_tokens": 256, "max_batch": 1, "device": "cpu"}
    limit = int(plan_memory(name, memory="1GiB", **asked).peak_bytes * 0.9)
    with ErnieModel.from_pretrained(name, progress=False, **asked) as model:
        expected = answers(model)
        assert model.stats.experts is None
    with ErnieModel.from_pretrained(name, progress=False, memory=str(limit), **asked) as model:
        assert model.plan.verdict == "streams"
        assert model.plan.peak_bytes <= limit
        assert model.load_report.weight_bytes == model.plan.weight_bytes
        found = answers(model)
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]
        slots, caches = model.plan.expert_slots, caches_of(model)
        assert slots is not None
        assert [cache.num_slots for cache in caches] == [slots.text, slots.vision][: len(caches)]
        counts = model.stats.experts
        assert counts is not None
        assert counts.hits > 0 < counts.misses
        assert "of experts lay in memory" in str(model.stats)


def caches_of(model: ErnieModel) -> Sequence[ExpertCache[Any]]:
    caches = model._loaded.expert_caches
    assert all(isinstance(cache, ExpertCache) for cache in caches)
    return cast(Sequence[ExpertCache[Any]], caches)


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ernie45-experts")}


def test_a_closed_model_gives_threads_and_memory_back(native: object) -> None:
    before = reader_threads()
    model = open_model(MOE, 5, quantization="int4")
    answers(model)
    assert reader_threads() > before
    filling = weakref.ref(caches_of(model)[0]._fill)
    counts = model.stats.experts
    model.close()
    assert reader_threads() == before
    gc.collect()
    assert filling() is None
    assert model.stats.experts == counts


def test_a_model_that_is_dropped_gives_threads_back(native: object) -> None:
    before = reader_threads()
    model = open_model(VL, 3, quantization="int4")
    answers(model)
    del model
    gc.collect()
    assert reader_threads() == before


def test_hundreds_of_steps_take_no_more_memory(native: object) -> None:
    with open_model(MOE, 5, quantization="int4", context_tokens=384) as model:
        options: dict[str, Any] = {"temperature": 1, "ignore_eos": True}
        model.generate(LONG[:20], max_new_tokens=100, seed=1, **options)
        before = resident_bytes()
        model.generate(LONG[:20], max_new_tokens=300, seed=2, **options)
        assert resident_bytes() - before < 2 << 20


def resident_bytes() -> int:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("what a process takes is read as on Linux")
    return int(pages.read_text().split()[1]) * mmap.PAGESIZE
