from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45 import ErnieModel, MemoryPlan, plan_memory
from ernie45.kernels.library import native_library
from ernie45.kernels.native import trim
from ernie45.memory.workspace import (
    MAX_STEP_GUESSES,
    PREFILL_CHUNK_TOKENS,
    RUNTIME_BYTES,
    SCORED_ROWS,
    loading_bytes,
    mtp_bytes,
    runs_natively,
    workspace_bytes,
)
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import save_checkpoint
from ernie45.spec import parse_spec

CONFIG = {
    "model_type": "ernie4_5", "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000, "use_bias": False,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip
SPEC = parse_spec(CONFIG)
TORCH = 2 * 600 * 2**10 + 14 * 2**20  # of layers, and of its products
MIB = 2**20


def workspace(
    preset: str = "none",
    context_tokens: int = 100,
    max_batch: int = 1,
    kv_dtype: str = "auto",
    has_draft: bool = False,
    native: bool = False,
) -> int:
    return workspace_bytes(
        SPEC,
        PRESETS[preset],
        bytes_per_value=2,
        context_tokens=context_tokens,
        max_batch=max_batch,
        kv_dtype=kv_dtype,
        has_draft=has_draft,
        native=native,
    )


def test_a_dense_step_is_fullest_in_its_mlp() -> None:
    # x and its norm 2 * 100 * 64 * 2, gate, up and silu 3 * 100 * 512 * 2; half as much again, and a rotary table.
    assert workspace() == (25_600 + 307_200) * 3 // 2 + 4 * 100 * 16 + TORCH


def test_a_quantised_product_needs_more() -> None:
    # Beside gate and up, int8 rows and their float32 copy, and sums as integers and in float32, twice.
    wide = 100 * 1024 * 2 + 100 * 64 * 5 + 2 * 8 * 100 * 1024
    assert workspace("int8") == (25_600 + wide) * 3 // 2 + 6_400 + TORCH


def test_a_prompt_beyond_a_chunk_costs_no_more_than_the_chunk_and_its_angles() -> None:
    chunk = workspace(context_tokens=PREFILL_CHUNK_TOKENS)
    # The last part of the prompt is of another length: products of five shapes are compiled for it, and for a chunk.
    assert workspace(context_tokens=2048) - chunk == 4 * (2048 - PREFILL_CHUNK_TOKENS) * 16 + 2 * 5 * 100 * 2**10


def test_an_int8_cache_is_read_into_the_models_dtype() -> None:
    assert workspace(context_tokens=65_536, kv_dtype="int8") > workspace(context_tokens=65_536)


@pytest.mark.parametrize("preset", PRESETS)
def test_it_grows_with_context_and_batch(preset: str) -> None:
    by_context = [workspace(preset, context_tokens=tokens) for tokens in (1, 256, 512, 4096)]
    by_batch = [workspace(preset, max_batch=rows) for rows in (1, 16, 256)]
    assert by_context == sorted(by_context)
    assert by_batch == sorted(by_batch)
    assert by_batch[0] < by_batch[-1]


def test_loading_holds_the_widest_matrix_and_a_block_of_a_file() -> None:
    assert loading_bytes(SPEC, PRESETS["none"], bytes_per_value=2) == 1024 * 64 * 2 + 16 * 2**20


def test_a_matrix_of_the_models_dtype_is_read_into_its_place_by_native_kernels() -> None:
    assert loading_bytes(SPEC, PRESETS["none"], bytes_per_value=2, native=True) == 16 * MIB
    rounded = [loading_bytes(SPEC, PRESETS["int4"], bytes_per_value=2, native=native) for native in (False, True)]
    # int4 codes have a buffer of their own, from which the kernels copy them to their place.
    assert rounded == [1024 * 64 * 2 + 24 * MIB, 1024 * 64 * 2 + 1024 * 64 // 2 + 24 * MIB]
    assert loading_bytes(SPEC, PRESETS["int8"], bytes_per_value=2, native=True) == 1024 * 64 * 2 + 24 * MIB


def test_a_native_step_is_fullest_in_its_mlp() -> None:
    # Beside norm(x) 100 * 64 * 2, silu(gate) * up in float32 and bfloat16; x and its angles, rows of logits of a prompt
    # that is scored and two more, a rotary table. No heap has a share in it: it is one block.
    around = 100 * (64 * 2 + 2 * 16 * 4) + (SCORED_ROWS + 2) * 1000 * 4 + 4 * 100 * 16
    attention = 100 * (64 + 64) * 2 + 100 * 12 * 16 * 4 + MIB
    assert workspace(native=True) == attention + around
    mlp = 512 * 64 * 2 + 512 * 2048 * (4 + 2)
    wide = parse_spec({**CONFIG, "intermediate_size": 2048})
    planned = workspace_bytes(
        wide, PRESETS["none"], bytes_per_value=2, context_tokens=512, max_batch=1, kv_dtype="auto", native=True
    )
    assert planned == mlp + 512 * (64 * 2 + 2 * 16 * 4) + (SCORED_ROWS + 2) * 1000 * 4 + 4 * 512 * 16


def test_native_attention_keeps_the_spans_of_a_long_context_apart() -> None:
    def beside_the_table(context_tokens: int) -> int:
        return workspace(context_tokens=context_tokens, max_batch=64, native=True) - 4 * context_tokens * 16

    spans = 64 * 4 * (16 + 2) * 4
    assert beside_the_table(3_000_000) - beside_the_table(2_000_000) == 977 * spans - 1 * spans


def test_a_draft_adds_the_rows_that_are_checked() -> None:
    for native in (False, True):
        assert workspace(max_batch=200, has_draft=True, native=native) == workspace(
            max_batch=200 + MAX_STEP_GUESSES, native=native
        )


def test_a_draft_head_adds_the_states_that_wait() -> None:
    # States of a chunk and of three rows, 8 times in all, and a rotary table.
    planned = mtp_bytes(SPEC, bytes_per_value=2, context_tokens=2000, max_batch=3)
    assert planned == (512 + 3) * 64 * 2 * 8 + 4 * 2000 * 16


def test_logits_of_a_scored_prompt_are_those_of_a_step_of_many_rows() -> None:
    wide = parse_spec({**CONFIG, "vocab_size": 100_000})

    def planned(max_batch: int, native: bool) -> int:
        options: dict[str, Any] = {"bytes_per_value": 2, "context_tokens": 512, "kv_dtype": "auto"}
        return workspace_bytes(wide, PRESETS["none"], max_batch=max_batch, native=native, **options)

    assert planned(32, native=True) - planned(1, native=True) < (32 - SCORED_ROWS) * 100_000 * 4
    assert planned(1, native=True) > SCORED_ROWS * 100_000 * 4
    assert planned(1, native=False) > SCORED_ROWS * 100_000 * 4


def test_what_the_native_kernels_take() -> None:
    spec = parse_spec({**CONFIG, "head_dim": 32})
    taken = [name for name in PRESETS if runs_natively(spec, PRESETS[name], "bfloat16")]
    assert taken == ["none", "int8", "int4"]
    assert [name for name in PRESETS if runs_natively(spec, PRESETS[name], "float32")] == ["int8", "int4"]
    assert not any(runs_natively(spec, preset, "float16") for preset in PRESETS.values())
    assert not runs_natively(spec, QuantPreset(name="mine", linear="nf4"), "bfloat16")
    for field, number in (("head_dim", 16), ("hidden_size", 80), ("intermediate_size", 96)):
        assert not runs_natively(parse_spec({**CONFIG, "head_dim": 32, field: number}), PRESETS["none"], "bfloat16")


def kernel_workspace() -> int:
    """What the native kernels keep between calls."""
    library = native_library()
    assert library is not None
    library.e45_workspace_bytes.restype = ctypes.c_int64
    return int(library.e45_workspace_bytes())


@pytest.mark.skipif(native_library() is None, reason="there are no native kernels here")
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_the_native_workspace_is_what_the_kernels_keep(name: str, preset: str) -> None:
    trim()
    options: dict[str, Any] = {"context_tokens": 600, "max_batch": 2}
    with ErnieModel.from_pretrained(
        f"ernie45/{name}", quantization=preset, device="cpu", dtype="bfloat16", progress=False, **options
    ) as model:
        model.batch_generate([[5] * 590, [6] * 590], max_new_tokens=2, temperature=0, ignore_eos=True)
        spec = model.spec
        kept = kernel_workspace()
        logits = (SCORED_ROWS + 2) * spec.vocab_size * 4
        around = 512 * (spec.hidden_size * 2 + spec.head_dim * 8) + logits + 4 * 600 * spec.head_dim
        planned = workspace_bytes(
            spec, PRESETS[preset], bytes_per_value=2, kv_dtype="auto", native=True, **options
        ) - around - (0 if preset == "none" else 8 * MIB)  # fmt: skip
        assert planned - MIB < kept < planned
    assert kernel_workspace() == 0  # given back with the model


WIDE = {**CONFIG, "hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128,
        "vocab_size": 103_424}  # fmt: skip
WIDE_MOE = {**WIDE, "model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 4, "moe_intermediate_size": 1024,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 1,
            "moe_use_aux_free": False}  # fmt: skip
SHORT_BYTES, OVER_BYTES = 7 * 2**20, 22 * 2**20  # by which a plan may be too low, and too high

SCRIPT = """
import sys
from pathlib import Path
from ernie45 import ErnieModel
from ernie45.memory import streaming

streaming._IMPORT_BYTES = 0

def status_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

before = status_bytes("VmHWM")
Path("/proc/self/clear_refs").write_text("5")
model = ErnieModel.from_pretrained(
    sys.argv[1], quantization=sys.argv[2], device="cpu", memory=sys.argv[3], context_tokens=256, max_batch=2,
    progress=False
)
many = range(1000, 9000, 30)  # tokens that are sent to all experts
model.batch_generate([many[:252], many[10:262]], max_new_tokens=4, temperature=0, ignore_eos=True)
model.score(many[:256])
print(status_bytes("VmHWM") - before, model.plan.peak_bytes)
"""


@pytest.fixture(scope="module")
def wide_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two layers, with the tokenizer of the published models, which is a third of what the runtime takes."""
    yield from _write(WIDE, shared_data, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def wide_moe_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with experts, which are most of it."""
    yield from _write(WIDE_MOE, shared_data, tmp_path_factory.mktemp("wide_moe"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("preset", ["none", "int8", "int4"])
def test_the_planned_peak_is_the_measured_one(preset: str, wide_folder: Path) -> None:
    check_peak(wide_folder, preset, "4GiB")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["none", "int8", "packed"])
def test_so_is_that_of_a_model_whose_experts_stream(
    form: str, wide_moe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie45.memory.streaming._IMPORT_BYTES", 0)
    folder, preset = wide_moe_folder, form
    if form == "packed":
        folder, preset = tmp_path / "packed", "auto"
        save_checkpoint(wide_moe_folder, folder, PRESETS["int4"], progress=False)

    def plan(memory: str) -> MemoryPlan:
        return plan_memory(folder, quantization=preset, device="cpu", memory=memory, context_tokens=256, max_batch=2)

    whole = plan("4GiB")
    streams = plan(str(whole.peak_bytes - whole.parts["routed_experts"] // 4))
    assert streams.verdict == "streams"
    # Readers' buffers are whole large pages, and each reader has a heap: 2 % of this, which such a plan leaves free.
    check_peak(folder, preset, str(streams.devices[0].capacity_bytes), short_bytes=streams.peak_bytes // 20)


def check_peak(folder: Path, preset: str, memory: str, short_bytes: int = SHORT_BYTES) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), preset, memory], capture_output=True, text=True, check=True
    )
    measured, planned = map(int, done.stdout.split())
    # Narrower than the runtime, so that a plan without it fails; runs and libraries differ by some MiB.
    assert SHORT_BYTES + OVER_BYTES < RUNTIME_BYTES
    assert -short_bytes < planned - measured < OVER_BYTES, (planned, measured)


def _write(config: dict[str, Any], shared_data: Path, folder: Path) -> Iterator[Path]:
    for path in (shared_data / "ERNIE-4.5-0.3B-PT").glob("*token*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    yield folder
    shutil.rmtree(folder)


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    spec = parse_spec(config)
    h, query, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (spec.vocab_size, h), "model.norm": (h,)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{name}_layernorm": (h,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}self_attn.{name}_proj": (width, h) for name, width in (("q", query), ("k", kv), ("v", kv))}
        shapes[f"{prefix}self_attn.o_proj"] = (h, query)
        mlps = {f"{prefix}mlp.": spec.intermediate_size}
        if spec.experts is not None:
            width = spec.experts.intermediate_size
            mlps = {f"{prefix}mlp.experts.{number}.": width for number in range(spec.experts.num_experts)}
            mlps[f"{prefix}mlp.shared_experts."] = spec.experts.num_shared_experts * width
            shapes[f"{prefix}mlp.gate"] = (spec.experts.num_experts, h)
        for mlp, width in mlps.items():
            shapes |= {f"{mlp}{name}_proj": (width, h) for name in ("gate", "up")} | {f"{mlp}down_proj": (h, width)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()
    }
