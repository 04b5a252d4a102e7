"""A folder made to harm ends in an error that names the file: none of it runs, nothing is built to its measure."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernie45 import ErnieModel
from ernie45.errors import CheckpointError, ConfigError, CorruptFileError, ErnieError, TensorError, TokenizerError
from tests.paddle_files import CONFIG, EXPERTS, FileLayout, FloatDtype, random_pt, write_checkpoint

MOE = {**CONFIG, **EXPERTS}
LAYOUTS: tuple[FileLayout, ...] = ("pt", "paddle", "paddleformers")


def load_error(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        ErnieModel.from_pretrained(folder, device="cpu", progress=False)
    assert caught.value.hint
    return caught.value


def a_folder(folder: Path, layout: FileLayout = "pt", **changes: object) -> Path:
    write_checkpoint(folder, random_pt(MOE), MOE, layout=layout)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


# Numbers without measure

BILLION = 10**9
ABSURD: list[dict[str, int]] = [
    {"num_hidden_layers": BILLION},
    {"num_hidden_layers": BILLION, "moe_layer_end_index": 10**18},
    {"num_attention_heads": BILLION},
    {"num_attention_heads": BILLION, "num_key_value_heads": BILLION},
    {"head_dim": BILLION},
    {"head_dim": 2**30, "num_attention_heads": 2**14},
    {"hidden_size": BILLION},
    {"intermediate_size": BILLION},
    {"vocab_size": BILLION},
    {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
    {"moe_num_experts": BILLION},
    {"moe_num_experts": BILLION, "moe_k": BILLION},
    {"moe_num_shared_experts": BILLION},
    {"moe_num_shared_experts": 2**31 - 1, "moe_intermediate_size": 2**31 - 1},
    {"moe_intermediate_size": BILLION},
    {"moe_layer_start_index": BILLION},
    {"moe_layer_interval": BILLION},
]
_MEASURE = """
import json, resource, sys, time
from pathlib import Path
from ernie45 import ErnieModel
from ernie45.errors import CheckpointError

folders = [Path(folder) for folder in sys.argv[2:]]
ErnieModel.from_pretrained(folders[0], device="cpu", progress=False).close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
for folder in folders:
    config = json.loads((folder / "config.json").read_text())
    for changes in json.loads(sys.argv[1]):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        try:
            ErnieModel.from_pretrained(folder, device="cpu", progress=False)
            raise SystemExit(f"{changes} was loaded")
        except CheckpointError as error:
            assert error.hint
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert kilobytes < 60_000, f"grew by {kilobytes} kB"
assert time.process_time() - started < 20, "took too long"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_a_config_of_absurd_numbers_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    folders = [str(a_folder(tmp_path / layout, layout)) for layout in LAYOUTS]
    command = [sys.executable, "-c", _MEASURE, json.dumps(ABSURD), *folders]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_of_gigabytes_is_not_read(tmp_path: Path, name: str) -> None:
    folder = a_folder(tmp_path)
    with (folder / name).open("wb") as file:
        file.truncate(2**33)  # takes no room on the disk, and would take all memory
    assert str(2**33) in load_error(folder).message


# Headers


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_one_flipped_bit_in_a_header_never_changes_the_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_pt(CONFIG), {**CONFIG, "num_hidden_layers": 2}, layout="paddle")
    with ErnieModel.from_pretrained(folder, device="cpu", progress=False) as model:
        expected = model.logits([3, 4, 5])
    file = folder / "model.safetensors"
    sound = file.read_bytes()
    header_bytes = 8 + int.from_bytes(sound[:8], "little")
    generator = random.Random(5)
    refusals = []
    for _ in range(80):
        place, bit = generator.randrange(header_bytes), generator.randrange(8)
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
        try:
            with ErnieModel.from_pretrained(folder, device="cpu", progress=False) as model:
                assert torch.equal(model.logits([3, 4, 5]), expected), (place, bit)
        except CheckpointError as error:
            refusals.append(error.message)
    assert len(refusals) > 60
    assert all("model.safetensors" in message or "tensor" in message for message in refusals)


ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
SHAPED = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}'
HEADERS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("numbers of 4000 digits", SHAPED % b",".join([b"9" * 4000] * 16), ("'a'", "shape")),
    ("one of 5000 digits", SHAPED % (b"9" * 5000), ("JSON",)),
    ("a name that cannot be shown", b'{"\\ud800":%s}' % ENTRY, (r"\ud800",)),
    ("a name that moves the cursor", b'{"\\u001b[2J":%s}' % ENTRY, (r"\x1b[2J",)),
    ("a name twice", b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), ("'a'", "twice")),
    ("nesting without end", b"[" * 100_000, ("JSON",)),
]


@pytest.mark.parametrize(("header", "shown"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS])
def test_an_evil_header(tmp_path: Path, header: bytes, shown: tuple[str, ...]) -> None:
    folder = a_folder(tmp_path)
    write_header(folder / "model.safetensors", header, b"\0" * 4)
    error = load_error(folder)
    assert type(error) is CorruptFileError
    for part in ("model.safetensors", *shown):
        assert part in error.message
    assert str(error).encode()  # no half surrogates


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x.safetensors", "\ud800.safetensors", "x" * 5000])
def test_an_index_that_names_an_evil_file(tmp_path: Path, shard: str) -> None:
    folder = a_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    error = load_error(folder)
    assert type(error) is CorruptFileError
    assert "model.safetensors.index.json" in error.message
    assert str(error).encode()
    assert len(str(error)) < 1000


def test_a_header_of_a_hundred_thousand_names_is_searched_in_bounded_time(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    names = (b'"model.layers.%d.x":%s' % (number, ENTRY) for number in range(100_000))
    write_header(folder / "model.safetensors", b"{" + b",".join(names) + b"}")
    assert "model.embed_tokens.weight" in load_error(folder).message


# Code


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    folder, marker = a_folder(tmp_path / "model"), tmp_path / "it ran"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    assert name in load_error(folder).message
    assert not marker.exists()


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    names = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    folder = a_folder(tmp_path / "model", auto_map=names)
    for name in ("configuration_evil", "modeling_evil", "__init__", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.E"]}}))
    with ErnieModel.from_pretrained(folder, device="cpu", progress=False) as model:
        assert model.logits([3]).shape == (1, 50)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% include 'config.json' %}",
        "{% extends '/etc/hosts' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{{ open('config.json').read() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% for i in range(10**9) %}{{ i }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'x' * 10**10 }}",
    ],
)
def test_a_template_that_reads_files_or_never_ends(small_folder_path: Path, tmp_path: Path, template: str) -> None:
    for file in small_folder_path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text(template)
    with ErnieModel.from_pretrained(tmp_path, device="cpu", progress=False) as model:
        with pytest.raises(ErnieError, match="template"):
            model.render([{"role": "user", "content": "hi"}])
        assert len(model.generate([5], max_new_tokens=1, ignore_eos=True).token_ids) == 1


GARBAGE = {"zeros": b"\0" * 1000, "every byte": bytes(range(256)) * 40, "empty": b"", "brackets": b"[" * 100_000}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_tokenizer_of_garbage(tmp_path: Path, name: str, content: bytes) -> None:
    folder = a_folder(tmp_path)
    (folder / name).write_bytes(content)
    error = load_error(folder)
    assert type(error) is TokenizerError
    assert name in error.message


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_file_of_half_a_gigabyte_is_not_read(
    make_checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = make_checkpoint(tmp_path)
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    with (folder / name).open("wb") as file:
        file.truncate(1 << 29)  # sparse: takes no disk
    started = time.monotonic()
    error = load_error(folder)
    assert type(error) is TokenizerError
    assert name in error.message
    assert "536,870,912 bytes" in error.message
    assert time.monotonic() - started < 5


# Values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("layout", "dtype", "name", "key"),
    [
        ("pt", "F32", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("pt", "BF16", "model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        ("pt", "U16", "model.layers.2.mlp.experts.3.up_proj.weight", "model.layers.2.mlp.experts.3.up_proj.weight"),
        ("paddle", "F32", "model.layers.0.self_attn.k_proj.weight", "ernie.layers.0.self_attn.qkv_proj.weight"),
        ("paddle", "U16", "model.layers.1.self_attn.o_proj.weight", "ernie.layers.1.self_attn.o_proj.weight"),
        ("paddle", "U16", "model.layers.1.mlp.gate.weight", "ernie.layers.1.mlp.gate.weight"),
        ("paddle", "BF16", "model.layers.2.mlp.moe_statics.e_score_correction_bias", "e_score_correction_bias"),
        ("paddleformers", "BF16", "model.layers.1.mlp.shared_experts.gate_proj.weight", "shared_experts.up_gate_proj"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, layout: FileLayout, dtype: FloatDtype, name: str, key: str, bad: float
) -> None:
    tensors = random_pt(MOE)
    tensors[name].flat[-1] = bad
    folder = write_checkpoint(tmp_path, tensors, MOE, layout=layout, dtype=dtype, num_shards=2)
    error = load_error(folder)
    assert type(error) is TensorError
    for part in (key, ".safetensors", "1 values that are not finite"):
        assert part in error.message


def test_values_that_overflow_the_wanted_dtype_are_named(tmp_path: Path) -> None:
    tensors = random_pt(CONFIG)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 2.0**20  # float16 ends at 65504
    folder = write_checkpoint(tmp_path, tensors, CONFIG, layout="paddle", dtype="BF16")
    with pytest.raises(TensorError, match="down_proj"):
        ErnieModel.from_pretrained(folder, dtype="float16", device="cpu", progress=False)


CONSTANTS: list[dict[str, Any]] = [
    {"rope_theta": 0.0},
    {"rms_norm_eps": float("inf")},
    {"moe_norm_min": float("nan")},
]


@pytest.mark.parametrize("changes", CONSTANTS, ids=[str(changes) for changes in CONSTANTS])
def test_constants_that_no_answer_survives(tmp_path: Path, changes: dict[str, Any]) -> None:
    error = load_error(a_folder(tmp_path, **changes))
    assert type(error) is ConfigError
    assert next(iter(changes)) in error.message
