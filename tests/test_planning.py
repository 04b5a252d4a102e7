from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45 import ErnieModel, list_models, plan_memory
from ernie45.catalogue import ModelInfo, built_in_folder
from ernie45.catalogue import find as find_entry
from ernie45.errors import InvalidRequestError, ModelNotFoundError, UnsupportedError
from ernie45.kernels.library import native_library
from ernie45.memory.budget import parse_limits
from ernie45.memory.machine import host_bytes
from ernie45.memory.placement import DeviceMemory
from ernie45.planning import has_bfloat16_arithmetic, usable_devices
from ernie45.presets import PRESETS, QuantPreset
from ernie45.saving import save_checkpoint
from ernie45.types.streaming import ExpertSlots
from tests.gptq_files import Order, write_gptq_folder
from tests.paddle_files import CONFIG, EXPERTS, random_pt, write_checkpoint

GIB = 2**30
MakeCheckpoint = Callable[..., Path]

IN_A_NEW_PROCESS = """
import json, socket, sys
def refuse(*arguments):
    raise SystemExit("tried to reach the network")
socket.socket.connect = socket.getaddrinfo = refuse
import ernie45
plan = ernie45.plan_memory(sys.argv[1], device="cpu", memory="700GiB")
print(json.dumps([plan.verdict, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def find(name: str) -> ModelInfo:
    entry = find_entry(name)
    assert entry is not None
    return entry


def plan(name: Any, **options: Any) -> ernie45.MemoryPlan:
    return plan_memory(name, **{"device": "cpu", "dtype": "bfloat16", "memory": "24GiB", **options})


# Names


@pytest.mark.parametrize("name", ["baidu/ERNIE-4.5-300B-A47B-PT", "ERNIE-4.5-VL-28B-A3B-Thinking"])
def test_planning_by_name_needs_no_torch_and_no_network(name: str) -> None:
    run = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS, name], capture_output=True, text=True, check=True)
    verdict, modules = json.loads(run.stdout)
    assert verdict == "fits"
    assert {"torch", "transformers", "huggingface_hub"} & set(modules) == set()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [entry.name for entry in list_models()])
def test_every_name_can_be_planned(name: str) -> None:
    made = plan(name, quantization="none", memory="2000GiB")
    entry = find(name)
    assert (made.model, made.verdict) == (name, "fits")
    assert made.weight_bytes == entry.weight_bytes
    refused = entry.precision != "bf16"
    assert any("Loading is refused" in note for note in made.notes) == refused


def test_an_unknown_name_is_no_model() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no known model 'ERNIE-4\.5-0\.3B-TP'") as caught:
        plan("ERNIE-4.5-0.3B-TP")
    assert "did you mean 'baidu/ERNIE-4.5-0.3B-PT'" in caught.value.hint
    with pytest.raises(ModelNotFoundError) as caught:
        plan("someone/else")
    assert "give a checkpoint's folder" in caught.value.hint
    for name in ("/no/such/folder", "~nouser/x", "n" * 5000, "/" + "n" * 5000, "./a\0b", Path("someone/else")):
        with pytest.raises(ModelNotFoundError, match="there is no folder") as caught:
            plan(name)
        assert caught.value.hint
        assert len(caught.value.message) < 300
    with pytest.raises(InvalidRequestError, match="empty"):
        plan("")
    with pytest.raises(InvalidRequestError, match="not int"):
        plan(5)


def test_300b_in_24_gib() -> None:
    streams = plan("ERNIE-4.5-300B-A47B-PT", quantization="int4", context_tokens=8192, max_batch=1)
    assert (streams.verdict, streams.num_experts) == ("streams", ExpertSlots(text=51 * 64))
    assert streams.expert_slots is not None
    assert 51 * 8 / 2 < streams.expert_slots.text < 51 * 64
    assert streams.weight_bytes < streams.peak_bytes < 24 * GIB < streams.disk_bytes
    asked = {"cpu": "24GiB", "disk": "50GB"}
    too_large = plan("ERNIE-4.5-300B-A47B-PT", quantization="none", memory=asked)
    assert (too_large.verdict, too_large.free_disk_bytes) == ("does not fit", 50 * 10**9)
    assert len(too_large.remedies) == 3


# Arguments


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int5"}, InvalidRequestError),
        ({"device": "gpu"}, UnsupportedError),
        ({"dtype": "int8"}, UnsupportedError),
        ({"memory": "many"}, InvalidRequestError),
        ({"memory": {"gpu": "1GiB"}}, InvalidRequestError),
        ({"context_tokens": 10**9}, InvalidRequestError),
        ({"max_batch": 0}, InvalidRequestError),
        ({"kv_dtype": "int4"}, InvalidRequestError),
    ],
)
def test_an_argument_that_cannot_be_used(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan("tiny-dense", **options)


def test_a_preset_of_ones_own() -> None:
    mine = QuantPreset(name="mine", experts="int4")
    made = plan("tiny-moe", quantization=mine)
    assert made.preset == "mine"
    assert made.parts["routed_experts"] == 3 * 8 * 3 * 256 * 128 // 2


def test_dtypes() -> None:
    assert plan("tiny-dense", dtype="float32").weight_bytes == 2 * plan("tiny-dense").weight_bytes
    assert plan("tiny-dense", dtype="auto").dtype == ("bfloat16" if has_bfloat16_arithmetic() else "float32")
    half = {**find("tiny-dense").config, "torch_dtype": "float16"}
    made = plan(half, dtype="auto")
    assert made.dtype == "float32"
    assert "does not compute" in made.notes[0]
    assert plan(half, dtype="auto", device="cuda:0", memory={"cuda:0": "1GiB"}).dtype == "float16"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_bfloat16_is_told_as_torch_tells_it(tmp_path: Path) -> None:
    assert has_bfloat16_arithmetic() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    (tmp_path / "cpuinfo").write_text("flags\t\t: avx2 avx512f avx512bw avx512vl\n")
    assert not has_bfloat16_arithmetic(tmp_path / "cpuinfo")
    assert not has_bfloat16_arithmetic(tmp_path / "none")


def test_speed_is_measured_only_for_memory_that_is_here() -> None:
    here = plan("ERNIE-4.5-0.3B-PT", quantization="none", memory="1GiB")
    assert here.tokens_per_second is not None
    assert here.tokens_per_second > 0
    elsewhere = plan("ERNIE-4.5-0.3B-PT", memory=str(host_bytes().total_bytes + 1))
    assert elsewhere.tokens_per_second is None
    assert plan("ERNIE-4.5-0.3B-PT", device="auto", memory={"cuda:0": "8GiB"}).tokens_per_second is None


# Devices


def names(device: str, memory: Any) -> list[str]:
    return [one.name for one in usable_devices(device, parse_limits(memory))]


def test_devices_are_those_that_are_named() -> None:
    named = {"cpu": "1GiB", "cuda:1": "2GiB", "cuda": "3GiB", "disk": "1GB"}
    assert names("auto", named) == names("cuda", named) == ["cuda:0", "cuda:1", "cpu"]
    assert names("cuda:1", named) == ["cuda:1", "cpu"]
    assert names("cpu", named) == ["cpu"]
    assert names("auto", {"cuda:0": "1GiB"}) == ["cuda:0"]
    assert names("auto", {"mps": "1GiB", "cpu": "1GiB"}) == ["mps"]
    assert names("cpu", {"cpu:1": "1GiB", "cpu:0": "1GiB"}) == ["cpu:0", "cpu:1"]
    assert names("cpu:1", {"cpu:1": "1GiB", "cpu:0": "1GiB"}) == ["cpu:1"]
    assert names("cpu", {"cpu": "1GiB", "cuda:0": "1GiB"}) == ["cpu"]
    assert usable_devices("cpu:1", parse_limits("5GiB")) == (DeviceMemory(name="cpu:1", capacity_bytes=5 * GIB),)
    (one,) = usable_devices("cpu", parse_limits("5GiB"))
    assert one.capacity_bytes == 5 * GIB


def test_what_is_free_counts_where_nothing_is_named() -> None:
    for memory in (None, {"disk": "1GB"}):
        (one,) = usable_devices("cpu", parse_limits(memory))
        assert one.name == "cpu"
        assert 0 < one.capacity_bytes <= host_bytes().total_bytes


@pytest.mark.parametrize(
    ("device", "memory"),
    [
        ("cpu", {"cuda:0": "1GiB", "disk": "1GB"}),
        ("cpu:1", {"cpu:0": "1GiB"}),
        ("cuda:1", {"cuda:0": "1GiB"}),
        ("cuda", {"mps": "1GiB"}),
    ],
)
def test_limits_of_other_devices_than_are_allowed(device: str, memory: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=f"names {next(iter(memory))}, but device={device!r} allows"):
        usable_devices(device, parse_limits(memory))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_here_can_be_planned_for_but_not_asked() -> None:
    with pytest.raises(UnsupportedError, match="not available"):
        usable_devices("cuda", parse_limits("5GiB"))
    assert plan("ERNIE-4.5-0.3B-PT", device="cuda", memory={"cuda": "8GiB"}).placement.devices == ("cuda:0",)


# What guesses


def test_a_draft_is_planned_by_name_without_torch_or_network() -> None:
    script = IN_A_NEW_PROCESS.replace("device=", "draft=sys.argv[2], device=")
    for draft in ("mtp", "lookup", "ERNIE-4.5-0.3B-PT"):
        command = [sys.executable, "-c", script, "ERNIE-4.5-21B-A3B-PT", draft]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        verdict, modules = json.loads(run.stdout)
        assert verdict == "fits"
        assert {"torch", "transformers", "huggingface_hub"} & set(modules) == set()


def test_what_a_draft_adds_at_21b() -> None:
    options: dict[str, Any] = {"quantization": "int4", "context_tokens": 8192, "max_batch": 8}
    alone, lookup, head, small = (
        plan("ERNIE-4.5-21B-A3B-PT", draft=draft, **options) for draft in (None, "lookup", "mtp", "ERNIE-4.5-0.3B-PT")
    )
    assert lookup.weight_bytes == alone.weight_bytes
    assert lookup.kv_bytes == alone.kv_bytes
    assert head.kv_bytes == alone.kv_bytes * 29 // 28
    values = 123_217_920 - 2560  # but for the last norm, which is the model's
    assert values / 2 < head.parts["draft"] < values * 0.55, "int4, with scales"
    waiting = (512 + 8) * 2560 * 2
    assert head.workspace_bytes > lookup.workspace_bytes + waiting
    draft = plan("ERNIE-4.5-0.3B-PT", **options)
    assert small.parts["draft"] == draft.weight_bytes
    assert small.kv_bytes == alone.kv_bytes + draft.kv_bytes
    both = lookup.workspace_bytes + draft.workspace_bytes
    angles = 8192 * 128 * 4
    takes_turns = native_library() is not None
    assert small.workspace_bytes == (lookup.workspace_bytes + angles if takes_turns else both)


@pytest.mark.parametrize(
    ("name", "draft", "error", "message"),
    [
        ("tiny-dense", 3, InvalidRequestError, "draft=3 names nothing"),
        ("tiny-dense", "mtp", UnsupportedError, "draft='mtp' was asked for, but ernie45/tiny-dense has no tensor"),
        ("tiny-vl", "mtp", UnsupportedError, "draft='mtp' was asked for, but ernie45/tiny-vl is not a text model"),
        ("tiny-dense", "tiny-vl", InvalidRequestError, "draft='tiny-vl': .* vision-language"),
        ("tiny-dense", "ERNIE-4.5-0.3B-PT", InvalidRequestError, "103424 ids, .* for one of 2048"),
        ("tiny-dense", "ERNIE-4.5-0.3B-TP", ModelNotFoundError, r"draft='ERNIE-4\.5-0\.3B-TP': "),
        ("tiny-dense", "./nowhere", ModelNotFoundError, "draft='./nowhere': there is no folder"),
    ],
)
def test_a_draft_that_cannot_guess(name: str, draft: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(name, draft=draft)


def test_a_folder_with_the_head_counts_it_as_loading_does(tmp_path: Path) -> None:
    config = {**QUANTISED, "use_bias": False, "num_nextn_predict_layers": 1}
    folders = [write_checkpoint(tmp_path / "plain", random_pt(config, mtp=True), config, layout="pt")]
    folders.append(tmp_path / "packed")
    save_checkpoint(folders[0], folders[1], PRESETS["int4"], progress=False)
    for folder in folders:
        without = plan(folder).weight_bytes
        for dtype in ("float32", "bfloat16"):
            made = plan(folder, draft="mtp", dtype=dtype)
            with ErnieModel.from_pretrained(folder, device="cpu", dtype=dtype, draft="mtp", progress=False) as model:
                assert made.parts["draft"] == model.plan.parts["draft"] > 0
                assert made.weight_bytes == model.plan.weight_bytes
        assert plan(folder).weight_bytes == without < made.weight_bytes


# Configs and folders


def test_a_config() -> None:
    config = find("ERNIE-4.5-21B-A3B-PT").config
    assert (
        plan(config, quantization="none").weight_bytes == plan("ERNIE-4.5-21B-A3B-PT", quantization="none").weight_bytes
    )


def test_a_folder_says_what_it_holds(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tied = plan(make_checkpoint(tmp_path / "tied"), quantization="none", dtype="auto")
    assert (tied.dtype, tied.weight_bytes, tied.parts["head"]) == ("float32", 37024 * 4, 0)
    untied = plan(
        str(make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)), quantization="none", dtype="auto"
    )
    assert untied.parts["head"] == untied.parts["embedding"] == 384 * 32 * 4


def test_a_head_that_equals_the_embedding_is_none(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for factor, head_bytes in ((1.0, 0), (2.0, 384 * 32 * 4)):
        head = tensors["model.embed_tokens.weight"] * factor
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
        assert plan(folder, quantization="none", dtype="auto").parts["head"] == head_bytes


def test_weights_that_are_quantised_already_keep_their_preset(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    preset = {"name": "mine", "experts": "int4", "linear": "int8", "embedding": None}
    stored = {"quant_method": "ernie45", "format_version": 1, "preset": preset}
    folder = make_checkpoint(tmp_path / "packed", quantization_config=stored)
    for asked in ("auto", "none"):
        assert plan(folder, quantization=asked).preset == "mine"
    with pytest.raises(UnsupportedError, match="stored as 'mine'"):
        plan(folder, quantization="int8")
    for same in (QuantPreset(name="mine", experts="int4", linear="int8"), QuantPreset(name="none")):
        assert plan(folder, quantization=same).preset == "mine"
    with pytest.raises(UnsupportedError, match=r"stored as QuantPreset\(name='mine'"):
        plan(folder, quantization=QuantPreset(name="mine", experts="int8", linear="int8"))
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert plan(make_checkpoint(tmp_path / "gptq", quantization_config=stored)).preset == "gptq"


def test_weights_whose_quantisation_is_not_read_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, quantization_config={"quantization": "wint2"})
    with pytest.raises(UnsupportedError, match="wint2"):
        plan(folder)


def test_native_kernels_count_where_they_serve(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    stored = make_checkpoint(tmp_path / "gptq", quantization_config=gptq)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ("tiny-dense", {"quantization": "int4"}),
        ("tiny-dense", {"device": "cuda", "memory": {"cuda:0": "1GiB"}}),
        ("tiny-dense", {"device": "auto", "memory": {"cuda:0": "1GiB", "cpu": "1GiB"}}),
        (stored, {}),
    ]
    workspaces = []
    for library in (object(), None):
        monkeypatch.setattr("ernie45.planning.native_library", lambda library=library: library)
        workspaces.append([plan(name, **options).workspace_bytes for name, options in cases])
    there, gone = workspaces
    assert there[0] < gone[0]
    assert there[1:] == gone[1:]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("as_folder", [False, True])
def test_pictures_have_the_limit_of_the_processors_files(as_folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,176 pixels in tiny-vl; the published limit is far higher."""
    asked: dict[str, Any] = {"context_tokens": 64, "max_batch": 1, "quantization": "none"}
    shipped = built_in_folder(find("tiny-vl"))
    name = str(shipped) if as_folder else "tiny-vl"
    with ErnieModel.from_pretrained(name, device="cpu", dtype="bfloat16", progress=False, **asked) as model:
        assert model.load_report.max_pixels == 50_176
        assert plan(name, **asked).workspace_bytes == model.plan.workspace_bytes
    monkeypatch.setattr("ernie45.planning.native_library", lambda: None)
    on_cuda = plan(name, device="cuda", memory={"cuda:0": "1GiB"}, **asked)
    assert on_cuda.workspace_bytes == plan(name, **asked).workspace_bytes


# All matrices have whole panels of rows, as those of published models: files do not say how many rows are padding.
QUANTISED = {
    **CONFIG, **EXPERTS, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "head_dim": 16,
    "use_bias": True,
}  # fmt: skip


def check_bytes(folder: Path) -> None:
    """A plan for the folder counts what loading finds, part by part."""
    for dtype in ("float32", "bfloat16"):
        with ErnieModel.from_pretrained(folder, device="cpu", dtype=dtype, progress=False) as model:
            made = plan(folder, dtype=dtype)
            assert {part: made.parts[part] for part in model.load_report.weight_parts} == model.load_report.weight_parts
            assert made.weight_bytes == model.load_report.weight_bytes


@pytest.mark.parametrize("preset", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_folder_says_its_bytes(preset: str, tied: bool, tmp_path: Path) -> None:
    config = {**QUANTISED, "tie_word_embeddings": tied}
    source = write_checkpoint(tmp_path / "source", random_pt(config), config, layout="pt")
    save_checkpoint(source, tmp_path / "packed", PRESETS[preset], progress=False)
    check_bytes(tmp_path / "packed")


@pytest.mark.parametrize("order", ["stored", "shared", "separate"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False, "plain": "shared_experts"}, {"group_size": -1}])
def test_a_gptq_folder_says_its_bytes(order: Order, options: dict[str, Any], tmp_path: Path) -> None:
    config = {**QUANTISED, "moe_intermediate_size": 32}
    source = write_checkpoint(tmp_path / "source", random_pt(config), config, layout="pt")
    write_gptq_folder(source, tmp_path / "gptq", tmp_path / "reference", order=order, **options)
    check_bytes(tmp_path / "gptq")
    save_checkpoint(tmp_path / "gptq", tmp_path / "packed", PRESETS["none"], progress=False)
    check_bytes(tmp_path / "packed")


def test_a_packed_vision_model_says_its_bytes(tmp_path: Path) -> None:
    save_checkpoint(built_in_folder(find("tiny-vl")), tmp_path / "packed", PRESETS["int4"], progress=False)
    check_bytes(tmp_path / "packed")
