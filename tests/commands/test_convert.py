"""Converting checkpoints of every layout; that transformers opens them is the point."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ernie45.checkpoint import write
from ernie45.checkpoint.headers import read_headers
from ernie45.commands import convert as convert_module
from ernie45.commands.convert import ConvertReport, convert
from ernie45.errors import CheckpointError, CorruptFileError, InvalidRequestError, TensorError, UnsupportedError

MakeCheckpoint = Callable[..., Path]
TEXT_FOLDERS = (
    *(f"{name}{kind}" for name in ("dense", "dense-erniekit", "moe", "moe-sharded", "moe-300b-like", "moe-mtp")
      for kind in ("", "/bf16")),
    "dense-pf1.2-native", "moe-pf1.2-native", "moe-pf1.2-hf",
)  # fmt: skip


def to_pt(source: Path, destination: Path, **options: Any) -> ConvertReport:
    return convert(source, destination, progress=False, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def moe_mtp(shared_fixtures: Path) -> Path:
    return shared_fixtures / "paddle" / "moe-mtp"


@pytest.mark.parametrize("name", TEXT_FOLDERS)
def test_transformers_opens_the_folder_and_gives_the_logits_of_paddle(
    shared_fixtures: Path, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    source = shared_fixtures / "paddle" / name
    report = to_pt(source, tmp_path / "out", max_shard_bytes=200_000)
    assert not report.was_finished
    model: Any
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert {key: value for key, value in info.items() if value} == {}
    reference = load_file(source / "reference.safetensors")
    ids, mask = reference["input_ids"], reference["attention_mask"]
    with torch.inference_mode():
        logits = model.eval()(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], reference["logits"][mask.bool()], atol=1e-4, rtol=0)


def test_every_tensor_of_paddle_is_there_under_its_pt_name(moe_mtp: Path, tmp_path: Path) -> None:
    report = to_pt(moe_mtp, tmp_path / "out")
    stored, converted = tensors_of(moe_mtp), tensors_of(tmp_path / "out")
    assert report.layout == "paddle"
    assert report.num_tensors == len(converted) == 128
    assert [tensor.name for tensor in report.dropped] == ["lm_head.weight"]
    assert torch.equal(converted["model.embed_tokens.weight"], stored["ernie.embed_tokens.weight"])
    assert torch.equal(converted["model.mtp_linear_proj.0.weight"], stored["ernie.mtp_linear_proj.0.weight"].T)
    assert torch.equal(converted["model.mtp_emb_norm.0.weight"], stored["ernie.mtp_emb_norm.0.weight"])
    query, key, value = stored["ernie.mtp_block.0.self_attn.qkv_proj.weight"].T.split([64, 32, 32])
    for name, expected in {"q_proj": query, "k_proj": key, "v_proj": value}.items():
        assert torch.equal(converted[f"model.mtp_block.0.self_attn.{name}.weight"], expected)
    gate, up = stored["ernie.layers.1.mlp.experts.3.up_gate_proj.weight"].T.chunk(2)
    assert torch.equal(converted["model.layers.1.mlp.experts.3.gate_proj.weight"], gate)
    assert torch.equal(converted["model.layers.1.mlp.experts.3.up_proj.weight"], up)
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 1


def test_raw_bits_become_bfloat16_and_the_router_stays_float32(moe_mtp: Path, tmp_path: Path) -> None:
    assert {info.dtype for info in read_headers(moe_mtp / "bf16").tensors.values()} == {"U16", "F32"}
    to_pt(moe_mtp / "bf16", tmp_path / "out")
    index = read_headers(tmp_path / "out")
    assert dict(index.metadata) == {"format": "pt"}
    assert {info.dtype for info in index.tensors.values()} == {"BF16", "F32"}
    in_float32 = {name.split(".mlp.")[1] for name, info in index.tensors.items() if info.dtype == "F32"}
    assert in_float32 == {"gate.weight", "moe_statics.e_score_correction_bias"}
    assert all(info.start % 4 == 0 for info in index.tensors.values() if info.dtype == "F32")


def test_config_of_a_dense_model_that_erniekit_called_moe(shared_fixtures: Path, tmp_path: Path) -> None:
    to_pt(shared_fixtures / "paddle" / "dense-erniekit" / "bf16", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == {
        "architectures": ["Ernie4_5ForCausalLM"],
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "max_position_embeddings": 131072,
        "model_type": "ernie4_5",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": True,
        "vocab_size": 512,
    }


def test_config_of_a_mixture_of_experts(shared_fixtures: Path, tmp_path: Path) -> None:
    to_pt(shared_fixtures / "paddle" / "moe-300b-like", tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    assert {key: value for key, value in config.items() if key.startswith("moe_")} == {
        "moe_num_experts": 8, "moe_k": 4, "moe_intermediate_size": 16, "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3, "moe_layer_end_index": 5, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
        "moe_use_aux_free": True,
    }  # fmt: skip
    assert (config["tie_word_embeddings"], config["dtype"], config["head_dim"]) == (False, "float32", 6)


def test_the_source_s_layout_and_files_leave_no_trace(shared_fixtures: Path, tmp_path: Path) -> None:
    """One model in both Paddle layouts and split into four files: the same weight files come out of all."""
    paddle = shared_fixtures / "paddle"
    for name in ("moe", "moe-sharded", "moe-pf1.2-native", "moe-pf1.2-hf"):
        to_pt(paddle / name, tmp_path / name, max_shard_bytes=300_000)
    to_pt(tmp_path / "moe", tmp_path / "again", max_shard_bytes=300_000)
    weights = [
        {name: data for name, data in content(tmp_path / folder).items() if "safetensors" in name}
        for folder in ("moe", "moe-pf1.2-native", "moe-pf1.2-hf", "again")
    ]
    assert len(weights[0]) > 4
    assert all(other == weights[0] for other in weights)
    assert tensors_of(tmp_path / "moe-sharded").keys() == tensors_of(tmp_path / "moe").keys()


@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_biases_are_split_like_their_weights(tmp_path: Path, num_kv_heads: int) -> None:
    """transformers makes the -PT folder, and it is fused here as Paddle does: by head where q and kv have as many."""
    from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

    config = Ernie4_5Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=num_kv_heads, head_dim=16, use_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = Ernie4_5ForCausalLM(config)
    expected = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items() if "lm_head" not in name}
    fused = {}
    for name, tensor in expected.items():
        parent, _, kind = name.rpartition(".")
        if parent.endswith(("k_proj", "v_proj", "up_proj")):
            continue
        key, value = name, tensor
        if parent.endswith("q_proj"):
            key = name.replace("q_proj", "qkv_proj")
            parts = [expected[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            groups = 4 if num_kv_heads == 4 else 1
            value = torch.cat([chunk for row in zip(*(part.chunk(groups) for part in parts)) for chunk in row])  # noqa: B905
        if parent.endswith("gate_proj"):
            key = name.replace("gate_proj", "up_gate_proj")
            value = torch.cat([tensor, expected[name.replace("gate_proj", "up_proj")]])
        is_linear = "_proj" in key and kind == "weight"
        fused[key.replace("model.", "ernie.", 1)] = (value.T if is_linear else value).contiguous()
    (tmp_path / "source").mkdir()
    save_file(fused, tmp_path / "source" / "model.safetensors", metadata={"format": "np"})
    config.save_pretrained(tmp_path / "source")
    to_pt(tmp_path / "source", tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert sum(name.endswith("bias") for name in found) == 14
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_files_are_at_most_as_large_as_asked(small_folder_path: Path, tmp_path: Path) -> None:
    report = to_pt(small_folder_path, tmp_path / "out", max_shard_bytes=20_000)
    stored, converted = tensors_of(small_folder_path), tensors_of(tmp_path / "out")
    assert stored.keys() == converted.keys()
    assert all(torch.equal(stored[name], converted[name]) for name in stored)
    embedding = stored["model.embed_tokens.weight"]
    assert embedding.nbytes > 20_000  # so it has a file of its own
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert weight_map.keys() == stored.keys()
    files = sorted(set(weight_map.values()))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert set(files) < set(report.files)
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            names = list(opened.keys())
        if "model.embed_tokens.weight" in names:
            assert names == ["model.embed_tokens.weight"]
        else:
            assert sum(stored[name].nbytes for name in names) <= 20_000


def test_other_files_are_copied_and_all_are_summed(small_folder_path: Path, tmp_path: Path) -> None:
    source = shutil.copytree(small_folder_path, tmp_path / "source")
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "configuration.py", "README.md"):
        (source / name).write_text("{}")
    config = read_json(source / "config.json") | {"auto_map": {"AutoConfig": "configuration.Config"}, "odd": 1}
    (source / "config.json").write_text(json.dumps(config))
    report = to_pt(source, tmp_path / "out")
    copied = {"tokenizer.model", "tokenizer_config.json", "LICENSE", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.files)
    assert set(report.files) == copied | {"config.json", "model.safetensors", "SHA256SUMS"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    written = read_json(tmp_path / "out" / "config.json")
    assert "auto_map" not in written
    assert "odd" not in written
    assert "odd" in str(report)
    comment, *lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert comment.startswith("# ernie45 convert ")
    assert sorted(line.split("  ")[1] for line in lines) == sorted(set(report.files) - {"SHA256SUMS"})
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert report.num_bytes == sum(map(len, content(tmp_path / "out").values()))


@pytest.mark.parametrize(("tied", "kept"), [(True, False), (None, False), (False, True)])
def test_a_head_equal_to_the_embedding(make_checkpoint: MakeCheckpoint, tmp_path: Path, tied: Any, kept: bool) -> None:
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=tied)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    report = to_pt(source, tmp_path / "out")
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) == kept
    assert [tensor.name for tensor in report.dropped] == ([] if kept else ["lm_head.weight"])
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] != kept


def test_a_head_of_its_own_is_kept_against_the_config(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", tie_word_embeddings=True)
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, source / "model.safetensors")
    report = to_pt(source, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], tensors["lm_head.weight"])
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert "output head" in str(report)


def test_a_bias_that_transformers_has_no_place_for(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    save_file(tensors_of(source) | {"lm_head.bias": torch.zeros(384)}, source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"lm_head\.bias"):
        to_pt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_loading_refuses_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    save_file(tensors_of(source) | {"model.surprise": torch.zeros(3)}, source / "model.safetensors")
    with pytest.raises(TensorError, match=r"model\.surprise"):
        to_pt(source, tmp_path / "out")
    quantised = make_checkpoint(tmp_path / "quantised", quantization_config={"quantization": "wint2"})
    with pytest.raises((CheckpointError, UnsupportedError), match="quanti"):
        to_pt(quantised, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills as Linux does; not tried elsewhere")
def test_killed_and_resumed_gives_the_bytes_of_an_uninterrupted_run(shared_fixtures: Path, tmp_path: Path) -> None:
    """Ten random points, again and again on one folder, and before every rename, deletion and flush."""
    script = Path(__file__).with_name("killed_convert.py")
    source = shared_fixtures / "paddle" / "dense" / "bf16"
    run = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path), "none", "150000"],
        capture_output=True, text=True, check=False, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["differing"] == []
    assert len(result["points"]) == 10
    assert len([name for name in result["files"] if name.endswith(".safetensors")]) == 3
    assert all(".ernie45-convert.json" in names and "SHA256SUMS" not in names for names in result["unfinished"])
    assert any("model-00001-of-00003.safetensors" in names for names in result["unfinished"])
    assert result["num_kills"] > 2
    assert result["num_steps"] > 40


class Cut(BaseException):
    """Stands for being killed."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, moe_mtp: Path, tmp_path: Path) -> Path:
    """A folder whose conversion was cut off in its second file."""
    monkeypatch.setattr(convert_module, "SYNC_BYTES", 100_000)
    whole = write.write_at
    left = 600_000

    def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise Cut
        whole(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_at", write_at)
        with pytest.raises(Cut):
            to_pt(moe_mtp, tmp_path / "cut", max_shard_bytes=400_000)
    return tmp_path / "cut"


def test_what_is_there_is_not_written_again(cut: Path, moe_mtp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = (cut / "model-00001-of-00004.safetensors").stat()
    journal = read_json(cut / ".ernie45-convert.json")["files"]
    done = sum(entry["num_bytes"] for entry in journal.values())
    assert 400_000 < done < 600_000
    written = 0
    whole = write.write_at

    def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
        nonlocal written
        written += len(data) if isinstance(data, memoryview) else 0
        whole(descriptor, data, position)

    monkeypatch.setattr(write, "write_at", write_at)
    report = to_pt(moe_mtp, cut, max_shard_bytes=400_000)
    assert report.resumed_bytes == done
    assert f"went on after {done:,} bytes" in str(report)
    assert written < report.num_bytes - done
    again = (cut / "model-00001-of-00004.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert not list(cut.glob("*.partial"))


def test_an_unfinished_folder_is_for_the_same_conversion_only(cut: Path, moe_mtp: Path, tmp_path: Path) -> None:
    before = content(cut)
    other = shutil.copytree(moe_mtp, tmp_path / "other")
    for source, shard_bytes in ((moe_mtp, 300_000), (moe_mtp.parent / "moe", 400_000)):
        with pytest.raises(InvalidRequestError, match="unfinished conversion of another"):
            to_pt(source, cut, max_shard_bytes=shard_bytes)
    # The same names and shapes, trained on: one value differs.
    path = other / "model.safetensors"
    start = read_headers(other).tensors["ernie.layers.2.mlp.experts.5.down_proj.weight"].start
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0\0\0\0")
    with pytest.raises(InvalidRequestError, match="unfinished conversion of another"):
        to_pt(other, cut, max_shard_bytes=400_000)
    assert content(cut) == before


def test_a_foreign_file_stops_it(cut: Path, moe_mtp: Path, tmp_path: Path) -> None:
    (cut / "notes.txt").write_text("mine")
    with pytest.raises(InvalidRequestError, match=r"notes\.txt"):
        to_pt(moe_mtp, cut, max_shard_bytes=400_000)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    with pytest.raises(InvalidRequestError, match=r"model\.safetensors"):
        to_pt(moe_mtp, tmp_path / "full")
    assert content(tmp_path / "full") == {"model.safetensors": b"mine"}


def test_bytes_that_changed_under_it_are_noticed(cut: Path, moe_mtp: Path) -> None:
    partial = cut / "model-00002-of-00004.safetensors.partial"
    partial.write_bytes(b"x" + partial.read_bytes()[1:])
    with pytest.raises(CorruptFileError, match=r"model-00002-of-00004\.safetensors\.partial"):
        to_pt(moe_mtp, cut, max_shard_bytes=400_000)


def test_a_finished_folder_is_left_alone(moe_mtp: Path, tmp_path: Path) -> None:
    to_pt(moe_mtp, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = to_pt(moe_mtp, tmp_path / "out")
    assert report.was_finished
    assert "is finished already" in str(report)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(InvalidRequestError, match="another checkpoint"):
        to_pt(moe_mtp / "bf16", tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors was written with .* now has 1,000"):
        to_pt(moe_mtp, tmp_path / "out")


def test_the_destination_must_lie_elsewhere(small_folder_path: Path, tmp_path: Path) -> None:
    for destination in (small_folder_path, small_folder_path / "out", small_folder_path / ".." / "small"):
        with pytest.raises(InvalidRequestError, match="lies in the source"):
            to_pt(small_folder_path, destination)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequestError, match="is a file"):
        to_pt(small_folder_path, tmp_path / "file")
    with pytest.raises(InvalidRequestError, match="max_shard_bytes is 0"):
        to_pt(small_folder_path, tmp_path / "out", max_shard_bytes=0)


def test_a_disk_without_room_is_told_before_the_start(
    small_folder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1234))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, but its disk has 1,234 free"):
        to_pt(small_folder_path, tmp_path / "out")
    assert content(tmp_path / "out") == {}


def test_a_disk_that_fills_up_is_an_error_of_ours_and_the_run_goes_on(
    small_folder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_at(descriptor: int, data: bytes | memoryview, position: int) -> None:
        if isinstance(data, memoryview):
            raise OSError(28, "No space left on device")
        whole(descriptor, data, position)

    whole = write.write_at
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_at", write_at)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            to_pt(small_folder_path, tmp_path / "out")
    assert "it goes on" in caught.value.hint
    assert not to_pt(small_folder_path, tmp_path / "out").was_finished


GROWTH_SCRIPT = """
import sys
import threading
import torch
from ernie45.commands.convert import convert

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

torch.zeros(64, 64).T.contiguous()
peak = before = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
report = convert(sys.argv[1], sys.argv[2], quantization=sys.argv[3], progress=False)
done.set()
thread.join()
print(peak - before, report.num_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("quantization", "num_layers", "vocab_size", "staged_bytes"),
    [
        ("none", 30, 8192, 8192 * 512 * 2),
        ("int4", 2, 120_000, 16 << 20),  # 123 MB, 61 MB rounded: neither is there as a whole, but 16 MiB, and 8 rounded
    ],
)
def test_memory_holds_one_tensor_and_not_a_file(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    quantization: str,
    num_layers: int,
    vocab_size: int,
    staged_bytes: int,
) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    source = make_checkpoint(
        tmp_path / "source", dtype="bfloat16", num_hidden_layers=num_layers, vocab_size=vocab_size, tokenizer=False,
        **shape,
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", GROWTH_SCRIPT, str(source), str(tmp_path / "out"), quantization],
        capture_output=True, text=True, check=False, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    growth, num_bytes = map(int, run.stdout.split())
    assert num_bytes > 60e6
    assert growth < staged_bytes + (16 << 20) + (16 << 20)  # a tensor, a block, and the interpreter's own
