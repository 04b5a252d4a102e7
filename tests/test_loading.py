from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie45 import ErnieModel, catalogue, loading, plan_memory, planning
from ernie45.backends import Backend, BuildOptions, TensorSource, register
from ernie45.backends.text import build_text
from ernie45.devices import choose_device, choose_dtype
from ernie45.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    TensorError,
    TokenizerError,
    UnsupportedError,
)
from ernie45.memory.machine import HostMemory
from ernie45.spec import ModelSpec, parse_spec

IDS = [5, 30, 99, 7]
MakeCheckpoint = Callable[..., Path]


def open_model(folder: Path | str, **options: Any) -> ErnieModel:
    return ErnieModel.from_pretrained(folder, **{"device": "cpu", "progress": False, **options})


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    with open_model(folder, **options) as model:
        return model.logits(IDS)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Folders


@pytest.mark.usefixtures("no_network")
def test_a_folder_needs_no_network(small_folder_path: Path) -> None:
    with open_model(small_folder_path) as model:
        assert model.generate("the cat", max_new_tokens=3, seed=1).usage.completion_tokens == 3
        assert model.chat([{"role": "user", "content": "hi"}], max_new_tokens=2, seed=1).token_ids


@pytest.mark.usefixtures("no_network")
def test_a_folder_may_be_given_as_text(small_folder_path: Path) -> None:
    with open_model(str(small_folder_path)) as model:
        assert model.name == str(small_folder_path)
        assert torch.equal(model.logits(IDS), logits_of(small_folder_path))


def test_shards_hold_the_same_model(make_checkpoint: MakeCheckpoint, small_folder_path: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path, num_shards=3)
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(logits_of(sharded), logits_of(small_folder_path))


def test_the_built_in_name_means_the_folder_in_the_package(
    monkeypatch: pytest.MonkeyPatch, small_folder_path: Path
) -> None:
    asked = []

    def built_in_folder(entry: Any) -> Path:
        asked.append(entry.name)
        return small_folder_path

    monkeypatch.setattr("ernie45.catalogue.built_in_folder", built_in_folder)
    with open_model("ernie45/tiny-dense") as model:
        assert (model.name, asked) == ("ernie45/tiny-dense", ["ernie45/tiny-dense"])
        assert model.load_report.folder == str(small_folder_path)


def test_an_unknown_name_is_no_model() -> None:
    with pytest.raises(ModelNotFoundError, match="no known model") as caught:
        open_model("ERNIE-4.5-0.3B-TP")
    assert "ERNIE-4.5-0.3B-PT" in caught.value.hint


# Weights


def test_a_tied_head_is_the_embedding(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path / "tied")
    untied = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    assert (tied / "model.safetensors").stat().st_size < (untied / "model.safetensors").stat().st_size
    assert not torch.equal(logits_of(tied), logits_of(untied))

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(untied, tie)
    torch.testing.assert_close(logits_of(untied), logits_of(tied))


def test_an_untied_checkpoint_without_a_head_has_lost_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    with pytest.raises(TensorError, match=r"lm_head\.weight"):
        open_model(folder)


def test_a_stored_head_is_used_even_where_the_config_ties_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """As transformers does; a full finetune saved with its old config would lose its head."""
    folder = make_checkpoint(tmp_path)
    head = torch.randn(384, 32, generator=torch.Generator().manual_seed(5))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    untied = make_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    rewrite(untied, lambda tensors: tensors.update({"lm_head.weight": head}))
    with open_model(folder) as model:
        assert model.load_report.ignored == ()
        assert torch.equal(model.logits(IDS), logits_of(untied))


def test_stored_rotary_frequencies_are_ignored(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    with open_model(folder) as model:
        assert [ignored.name for ignored in model.load_report.ignored] == [name]


def test_a_tensor_without_a_place_is_an_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_norm.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    with pytest.raises(TensorError, match=name):
        open_model(folder)


def test_a_missing_tensor_is_an_error(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    rewrite(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(TensorError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(folder)


# Tokenizer


def test_without_tokenizer_files_ids_are_all_there_is(
    make_checkpoint: MakeCheckpoint, small_folder_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0}
    with open_model(make_checkpoint(tmp_path, tokenizer=False)) as model:
        completion = model.generate(IDS, **options)
        assert len(completion.token_ids) == 5
        assert completion.text == ""
        chunks = list(model.stream_generate(IDS, **options))
        assert tuple(i for chunk in chunks for i in chunk.token_ids) == completion.token_ids
        assert {chunk.text for chunk in chunks} == {""}
        assert torch.equal(model.logits(IDS), logits_of(small_folder_path))
        assert len(model.score(IDS).logprobs) == 3

        calls: list[Callable[[], object]] = [
            lambda: model.generate("the cat"),
            lambda: model.stream_generate("the cat"),
            lambda: model.chat([{"role": "user", "content": "hi"}]),
            lambda: model.render([{"role": "user", "content": "hi"}]),
            lambda: model.score("the cat"),
            lambda: model.logits("the cat"),
            lambda: model.generate(IDS, stop="x"),
            lambda: model.tokenizer,
        ]
        for call in calls:
            with pytest.raises(TokenizerError, match=r"tokenizer\.model nor tokenizer\.json") as caught:
                call()
            assert "tokenizer files" in caught.value.hint
        assert model.generate(IDS, **options).token_ids == completion.token_ids


def test_a_tokenizer_larger_than_the_embedding_belongs_to_another_model(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, vocab_size=300)
    with pytest.raises(TokenizerError, match=r"321 tokens.*300"):
        open_model(folder)


def test_ids_without_a_token_are_never_drawn(small_model: ErnieModel) -> None:
    num_ids = small_model.tokenizer.size
    assert num_ids < small_model.spec.vocab_size
    drawn = small_model.generate(IDS, max_new_tokens=200, temperature=50.0, top_p=1.0, seed=0, ignore_eos=True)
    assert max(drawn.token_ids) < num_ids
    assert len(set(drawn.token_ids)) > 50


def test_replies_end_with_every_end_token(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, eos_token_id=[2, 40])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 41}))
    with open_model(folder) as model:
        separator = model.tokenizer.token_id("<|end_of_sentence|>")
        assert separator is not None
        for end in (2, 40, 41, separator):
            completion = model.generate(IDS, temperature=0, logit_bias={end: 100.0}, max_new_tokens=4)
            assert (completion.token_ids, completion.finish_reason, completion.text) == ((end,), "stop", "")


def test_the_end_of_a_thinking_models_turn_ends_replies(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, eos_token_id=2)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 350}))
    with open_model(folder) as model:
        completion = model.generate(IDS, temperature=0, logit_bias={350: 100.0}, max_new_tokens=4)
        assert (completion.token_ids, completion.finish_reason, completion.text) == ((350,), "stop", "")


@pytest.mark.parametrize("adapter", [5, b"x", "", "  "])
def test_an_adapter_that_names_no_folder_is_a_mistake(small_folder_path: Path, adapter: Any) -> None:
    with pytest.raises(InvalidRequestError, match="adapter= is"):
        open_model(small_folder_path, adapter=adapter)


@pytest.mark.parametrize("adapter", ["user/my-lora", "~nosuchuser/x", "a\0b"])
def test_an_adapter_is_not_fetched(small_folder_path: Path, adapter: str) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no adapter folder") as caught:
        open_model(small_folder_path, adapter=adapter)
    assert "not fetched" in caught.value.hint


def test_generation_config_sets_what_a_call_leaves_out(
    make_checkpoint: MakeCheckpoint, small_model: ErnieModel, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    sampled: dict[str, Any] = {"max_new_tokens": 12, "seed": 3, "temperature": 2.0, "top_p": 1.0}
    with open_model(folder) as model:
        greedy = small_model.generate(IDS, max_new_tokens=12, temperature=0)
        assert model.generate(IDS, max_new_tokens=12).token_ids == greedy.token_ids
        assert model.generate(IDS, **sampled).token_ids == small_model.generate(IDS, **sampled).token_ids
        assert model.generate(IDS, **sampled).token_ids != greedy.token_ids


# Devices and dtypes


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_any_dtype_loads_as_any_other(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, stored: str, wanted: str
) -> None:
    folder = make_checkpoint(tmp_path, dtype=stored)
    with open_model(folder, dtype=wanted) as model:
        assert (model.load_report.dtype, model.load_report.device) == (wanted, "cpu")
        assert model.load_report.weight_bytes == 37024 * getattr(torch, wanted).itemsize
        logits = model.logits(IDS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_of(folder, dtype="float32"), atol=0.5, rtol=0.1)


def test_auto_dtype_is_the_checkpoints_where_the_device_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", checkpoint="float32", device=cpu) is torch.float32
    assert choose_dtype("auto", checkpoint="float16", device=cpu) is torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda supported=supported: supported)
        )
        assert choose_dtype("auto", checkpoint="bfloat16", device=cpu) is expected
    assert choose_dtype("bfloat16", checkpoint="float32", device=cpu) is torch.bfloat16


def test_auto_device_takes_an_accelerator_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UnsupportedError, match="cuda:2"):
        choose_device("cuda:2")


# Memory

# The small model: 37,024 weights; 2 layers · 2 heads · 16 · keys and values = 128 numbers of KV cache a token.
WEIGHT_BYTES = 37024 * 4
TOKEN_BYTES = 128 * 4


def peak_of(folder: Path, **asked: Any) -> int:
    """What a plan says that it takes."""
    plan = plan_memory(folder, quantization="none", device="cpu", memory="1GiB", **asked)
    assert plan.verdict == "fits"
    return plan.peak_bytes


def test_what_is_left_open_is_chosen_to_fit(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, max_position_embeddings=32768)
    with open_model(folder, memory="1GiB") as model:
        assert model.context_tokens == model.plan.context_tokens == 8192
        assert model.plan.kv_bytes == 32 * 8192 * TOKEN_BYTES
    limit = str(peak_of(folder, context_tokens=5000, max_batch=20))
    with open_model(folder, memory={"cpu": limit, "cuda:0": "1GiB"}, max_batch=20, quantization="none") as model:
        assert model.context_tokens == 5000
        assert model.generate(IDS * 20, temperature=0, ignore_eos=True, max_new_tokens=5).usage.total_tokens == 85
    with pytest.raises(InvalidRequestError, match="device='cpu' allows none"):
        open_model(folder, memory={"cuda:0": "1B"})


def test_no_limit_is_what_is_free(
    monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    # With so large keys and values it is these that a context is limited by, and not what loading needs.
    folder = make_checkpoint(tmp_path, max_position_embeddings=32768, num_key_value_heads=4, head_dim=128)
    free = peak_of(folder, context_tokens=5000, max_batch=1)
    memory = HostMemory(total_bytes=10**12, available_bytes=free, limited_by="machine", limit_bytes=None)
    monkeypatch.setattr(planning, "host_bytes", lambda: memory)
    with open_model(folder, quantization="none") as model:
        assert (model.context_tokens, model.plan.max_batch) == (5000, 1)


def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, small_folder_path: Path
) -> None:
    monkeypatch.setattr("ernie45.checkpoint.read.TensorReader._read_bytes", None)
    for limits in ({"memory": str(WEIGHT_BYTES)}, {"memory": "20MB", "context_tokens": 256}):
        # Most is needed by a step on the native kernels, and by loading on torch's.
        parts = r"\(weights 0\.1 MiB, .*(workspace|buffers while loading) 1[56]\.\d MiB"
        with pytest.raises(OutOfMemoryError, match=parts) as caught:
            open_model(small_folder_path, quantization="none", **limits)
        assert "GiB of memory on cpu instead of" in caught.value.hint


def test_a_cgroup_that_sets_the_limit_is_named(monkeypatch: pytest.MonkeyPatch, small_folder_path: Path) -> None:
    memory = HostMemory(total_bytes=10**12, available_bytes=5_000_000, limited_by="cgroup", limit_bytes=10**7)
    for module in (planning, loading):
        monkeypatch.setattr(module, "host_bytes", lambda: memory)
    with pytest.raises(OutOfMemoryError, match=r"there are 4\.8 MiB within the limit of this process's memory cgroup"):
        open_model(small_folder_path)
    with pytest.raises(OutOfMemoryError) as caught:
        open_model(small_folder_path, memory="5MB")
    assert "cgroup" not in caught.value.message


def test_no_limit_is_above_what_there_is(monkeypatch: pytest.MonkeyPatch, small_folder_path: Path) -> None:
    has: dict[str, Any] = {"available_bytes": 1000, "limited_by": "machine"}
    for total, cgroup, where in ((5_000_000, None, "in this machine"), (10**12, 5_000_000, "memory cgroup")):
        memory = HostMemory(total_bytes=total, limit_bytes=cgroup, **has)
        monkeypatch.setattr(loading, "host_bytes", lambda memory=memory: memory)
        with pytest.raises(OutOfMemoryError, match=rf"there are 4\.8 MiB .*{where}"):
            open_model(small_folder_path, memory="1GiB")
    memory = HostMemory(total_bytes=10**9, limit_bytes=None, **has)
    monkeypatch.setattr(loading, "host_bytes", lambda: memory)
    with open_model(small_folder_path, memory="1GiB") as model:  # what others use may be given back
        assert model.plan.devices[0].capacity_bytes == 10**9


def only_small_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A Hub whose repositories are all `folder`, and whose weights nobody may fetch."""

    def fetch(repo_id: str, *, check: Callable[[Path], object], **options: Any) -> Path:
        check(folder)
        raise AssertionError("fetches the weights")

    monkeypatch.setattr("ernie45.checkpoint.hub.fetch_checkpoint", fetch)


def test_what_cannot_fit_is_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_small_files(monkeypatch, tmp_path)
    entry = catalogue.find("ERNIE-4.5-300B-A47B-PT")
    assert entry is not None
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    host = HostMemory(total_bytes=10**12, available_bytes=10**12, limited_by="machine", limit_bytes=None)
    monkeypatch.setattr(loading, "host_bytes", lambda: host)
    for config, refused, fits in (
        (entry.config, "6GiB", "300GiB"),
        ({**entry.config, "quantization_config": gptq}, "6GiB", "150GiB"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(OutOfMemoryError, match=r"this needs .* GiB on cpu as"):
            open_model(entry.name, memory=refused, dtype="bfloat16")
        with pytest.raises(AssertionError, match="fetches the weights"):
            open_model(entry.name, memory=fits, dtype="bfloat16", context_tokens=256, max_batch=1)


def test_two_devices_hold_a_part_each_and_give_the_same_logits() -> None:
    asked: dict[str, Any] = {"quantization": "none", "context_tokens": 64, "max_batch": 1}
    with open_model("ernie45/tiny-moe", **asked) as model:
        whole, peak, weights = model.logits(IDS), model.plan.peak_bytes, model.plan.weight_bytes
    limit = str(peak - weights // 3)
    with open_model("ernie45/tiny-moe", memory={"cpu:0": limit, "cpu:1": limit}, **asked) as model:
        assert model.plan.placement.devices == ("cpu:0", "cpu:1")
        assert model.plan.weight_bytes == weights
        assert torch.equal(model.logits(IDS), whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_named_must_be_there(small_folder_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'cuda:0' is not available"):
        open_model(small_folder_path, device="auto", memory={"cuda:0": "1GiB"})


def test_an_int8_kv_cache(small_folder_path: Path) -> None:
    with open_model(small_folder_path) as exact, open_model(small_folder_path, kv_dtype="int8") as model:
        assert model.plan.kv_bytes == exact.plan.kv_bytes * (16 + 2) // (16 * 4)
        torch.testing.assert_close(model.logits(IDS), exact.logits(IDS), atol=0.1, rtol=0.1)
    wrong: dict[str, Any] = {"kv_dtype": "int4"}
    with pytest.raises(InvalidRequestError, match="int4"):
        open_model(small_folder_path, **wrong)


def test_context_and_batch_are_as_asked(small_folder_path: Path) -> None:
    with open_model(small_folder_path, context_tokens=20, max_batch=3) as model:
        assert model.context_tokens == 20
        replies = model.batch_generate([IDS] * 7, max_new_tokens=16, temperature=0)
        assert len({reply.token_ids for reply in replies}) == 1


# Quantization and the report


@pytest.mark.parametrize("preset", ["none", "int8", "int4", "nf4", "bnb-int8"])
def test_a_preset_takes_what_was_planned(preset: str) -> None:
    planned = plan_memory("ernie45/tiny-moe", quantization=preset, device="cpu", dtype="bfloat16")
    with open_model("ernie45/tiny-moe", quantization=preset, dtype="bfloat16") as model:
        report = model.load_report
        assert (report.preset, report.weight_bytes) == (preset, planned.weight_bytes)
        assert report.weight_parts == {part: planned.parts[part] for part in report.weight_parts}
        assert report.planned_peak_bytes == model.plan.peak_bytes
        assert f"preset {preset!r}, planned to take at most {model.plan.peak_bytes:,} bytes" in str(report)
        assert model.plan.tokens_per_second is not None


def test_auto_takes_the_preset_that_fits(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, hidden_size=512, intermediate_size=4096)
    asked: dict[str, Any] = {"context_tokens": 64, "max_batch": 1}
    with open_model(folder, **asked) as model:
        assert model.plan.preset == "none"
        limit = model.plan.peak_bytes - 1
    with open_model(folder, memory=str(limit), **asked) as model:
        assert model.plan.preset == model.load_report.preset == "int8"
        assert model.plan.peak_bytes <= limit


def test_a_backend_that_knows_no_presets_is_not_asked_for_one(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie45.backends.registry._registered", {})
    register("plain", parse_spec=lambda config: parse_spec({**config, "model_type": "ernie4_5"}), build=build_text)
    folder = make_checkpoint(tmp_path, model_type="plain")
    only_small_files(monkeypatch, folder)
    for name in (folder, "org/model"):
        with pytest.raises(UnsupportedError, match=r"quantization='int8' was asked for.* does not quantise"):
            open_model(name, quantization="int8")
    for quantization in ("auto", "none"):
        with open_model(folder, quantization=quantization) as model:
            assert (model.load_report.preset, model.load_report.weight_bytes) == ("none", WEIGHT_BYTES)


def test_weights_that_take_other_bytes_than_planned_are_a_bug(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(spec: ModelSpec, source: TensorSource, options: BuildOptions) -> Backend:
        backend = build_text(spec, source, options)
        if backend.device.type != "meta":
            backend.weight_bytes = {"embedding": 99}
        return backend

    monkeypatch.setattr("ernie45.backends.registry._registered", {})
    register("growing", parse_spec=lambda config: parse_spec({**config, "model_type": "ernie4_5"}), build=build)
    folder = make_checkpoint(tmp_path, model_type="growing")
    with pytest.raises(RuntimeError, match=r"a bug in ernie45\.backends\.text\.TextBackend.*\{'embedding': 99\}"):
        open_model(folder)


def test_an_unknown_preset_is_a_mistake(small_folder_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="int5"):
        open_model(small_folder_path, quantization="int5")
    with open_model(small_folder_path, quantization="none") as model:
        assert model.load_report.dtype == "float32"


def test_the_report_says_what_was_read(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, num_shards=2, dtype="bfloat16", surprising_key=1, another=None)
    with open_model(folder, dtype="float32") as model:
        report = model.load_report
        assert model.spec.unknown_keys == ("another", "surprising_key")
    assert report.folder == str(folder)
    assert report.num_tensors == 2 + 2 * 9
    assert report.weight_bytes == WEIGHT_BYTES
    assert 0 < report.load_seconds < 60
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert report.ignored == ()
    assert report.unknown_config_keys == ("another", "surprising_key")


def write_adapter(folder: Path, name: str, a: torch.Tensor, b: torch.Tensor) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": a.shape[0], "lora_alpha": 6, "target_modules": [name.rpartition(".")[2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = f"base_model.model.{name}"
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_merged_while_loading(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(64, 2, generator=generator)
    name = "model.layers.1.mlp.up_proj"
    adapter = write_adapter(tmp_path / "adapter", name, a, b)
    with open_model(folder, adapter=str(adapter)) as model:
        adapted = model.logits(IDS)
        assert model.load_report.adapter == str(adapter)
    plain = logits_of(folder)
    rewrite(folder, lambda tensors: tensors.update({f"{name}.weight": tensors[f"{name}.weight"] + 3.0 * b @ a}))
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, logits_of(folder), atol=1e-5, rtol=0)


def test_an_adapter_that_overflows_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base")
    a, b = torch.full((2, 32), 1e20), torch.full((64, 2), 1e20)
    adapter = write_adapter(tmp_path / "adapter", "model.layers.1.mlp.up_proj", a, b)
    with pytest.raises(
        TensorError, match=r"the adapter in .* makes values of 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        open_model(folder, adapter=adapter)


def test_an_adapter_for_another_model_is_refused_before_a_weight_is_read(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "base")
    a, b = torch.zeros(2, 32), torch.zeros(64, 2)
    adapter = write_adapter(tmp_path / "adapter", "model.layers.2.mlp.up_proj", a, b)
    monkeypatch.setattr("ernie45.checkpoint.read.TensorReader._read_bytes", None)
    with pytest.raises(TensorError, match=r"model\.layers\.2\.mlp\.up_proj"):
        open_model(folder, adapter=adapter)


def test_quantised_paddle_files_are_refused_by_config_and_by_header(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "config", quantization_config={"quantization": "wint2"})
    with pytest.raises(UnsupportedError, match="wint2"):
        open_model(folder)
    folder = make_checkpoint(tmp_path / "header")
    name = "model.layers.0.mlp.up_proj"
    rewrite(folder, lambda tensors: tensors.update({f"{name}.quant_weight": torch.zeros(4, 4, dtype=torch.int8)}))
    with pytest.raises(UnsupportedError, match="quant_weight"):
        open_model(folder)


@pytest.mark.usefixtures("no_network")
def test_quantised_paddle_releases_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"ERNIE-4\.5-300B-A47B-2Bits-Paddle") as caught:
        open_model("baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle")
    assert "ERNIE-4.5-300B-A47B-PT" in caught.value.hint


def test_a_head_stored_beside_an_equal_embedding_is_left_out(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    plain = logits_of(folder)
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    with open_model(folder) as model:
        assert [tensor.name for tensor in model.load_report.ignored] == ["lm_head.weight"]
        assert "equal to model.embed_tokens.weight" in str(model.load_report)
        assert model.load_report.weight_bytes == WEIGHT_BYTES
        assert torch.equal(model.logits(IDS), plain)


# The peak is VmHWM and not ru_maxrss, which a process inherits from the one that started it.
GROWTH_SCRIPT = """
import sys
import psutil
import torch
import ernie45.model
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
weight @ weight  # oneDNN sets itself up once, whatever the model's size
before = psutil.Process().memory_info().rss
model = ernie45.ErnieModel.from_pretrained(sys.argv[1], device="cpu", dtype="bfloat16", progress=False)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print((peak - before) / model.load_report.weight_bytes, model.load_report.weight_bytes)
model.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_memory_than_the_weights(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
    folder = make_checkpoint(
        tmp_path, dtype="bfloat16", num_shards=2, num_hidden_layers=46, vocab_size=4096, tokenizer=False, **shape
    )
    run = subprocess.run(
        [sys.executable, "-c", GROWTH_SCRIPT, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    growth, weight_bytes = run.stdout.split()
    assert int(weight_bytes) > 280e6
    assert float(growth) <= 1.1


def test_pictures_are_smaller_on_a_cpu_unless_asked_otherwise(shared_fixtures: Path) -> None:
    folder = shared_fixtures / "paddle" / "vl"
    options: dict[str, Any] = {"device": "cpu", "context_tokens": 64, "progress": False}
    with ErnieModel.from_pretrained(folder, **options) as model:
        assert model.load_report.max_pixels == 802_816
        assert "802,816 pixels" in str(model.load_report)
    with ErnieModel.from_pretrained(folder, max_pixels=4_000_000, **options) as model:
        assert model.load_report.max_pixels == 4_000_000
    wrong: dict[str, Any] = {"max_pixels": 783}
    with pytest.raises(InvalidRequestError, match="from 784, not 783"):
        ErnieModel.from_pretrained(folder, **wrong, **options)
    wrong = {"media_limits": {"max_bytes": 1}}
    with pytest.raises(InvalidRequestError, match="must be MediaLimits, not dict"):
        ErnieModel.from_pretrained(folder, **wrong, **options)
