"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    import torch

    from ernie45 import ErnieModel
    from ernie45.kernels.native import Kernels

REPO_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real ERNIE 4.5 tokenizer files, templates and golden outputs, kept beside the repository."""
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Folder of small Paddle checkpoints with their reference logits, kept beside the repository."""
    return _shared_folder("fixtures")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test as soon as it looks up a host or connects to one."""

    def refuse(*arguments: object) -> NoReturn:
        pytest.fail(f"tried to reach the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The torch implementations serve, as they do where no native library was built."""
    from ernie45.kernels import library
    from ernie45.kernels.native import kernels

    monkeypatch.setattr(library, "_loaded", lambda: "no library was built")
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@pytest.fixture
def native() -> Iterator[Kernels]:
    """The native kernels; afterwards they use the instruction set and the threads that they use at first."""
    from ernie45.kernels import library
    from ernie45.kernels.native import kernels

    found = kernels()
    if found is None:
        pytest.skip(f"no native kernels: {library.why_not()}")
    yield found
    library.use_instruction_set(library.instruction_sets()[0])
    library.set_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files as the published ones are: sentencepiece with byte fallback, ERNIE's turn tokens added to it."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    lines = ["the cat sat on the mat", "a cat and a hat", "that is the hat of the cat", "你好，世界", "世界你好"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer_folder: Path) -> Callable[..., Path]:
    """`make_checkpoint(folder, seed=0, dtype="float32", num_shards=1, tokenizer=True, **config)`: a small dense
    checkpoint of random weights in published form. `config` entries override config.json, and the shapes with it."""

    def make(
        folder: Path,
        *,
        seed: int = 0,
        dtype: str = "float32",
        num_shards: int = 1,
        tokenizer: bool = True,
        **entries: Any,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = {**SMALL_CONFIG, "torch_dtype": dtype, **entries}
        (folder / "config.json").write_text(json.dumps(config))
        _save_shards(folder, _random_tensors(config, seed, dtype), num_shards)
        if tokenizer:
            for file in tokenizer_folder.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make


@pytest.fixture(scope="session")
def small_folder_path(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a tokenizer; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture(scope="session")
def small_model(small_folder_path: Path) -> Iterator[ErnieModel]:
    """The model of `small_folder_path`, open for the whole session."""
    from ernie45 import ErnieModel

    with ErnieModel.from_pretrained(small_folder_path, device="cpu", progress=False) as model:
        yield model


# The entries of a published config.json, in small. The embedding has rows that the tokenizer has no tokens for.
SMALL_CONFIG = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "model_type": "ernie4_5",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_cache": False,
    "vocab_size": 384,
}


def _random_tensors(config: Mapping[str, Any], seed: int, dtype: str) -> dict[str, torch.Tensor]:
    import torch

    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        widths = {
            "q_proj": (query, hidden),
            "k_proj": (key, hidden),
            "v_proj": (key, hidden),
            "o_proj": (hidden, query),
        }
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in widths.items()}
        widths = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes |= {f"{prefix}mlp.{name}.weight": shape for name, shape in widths.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        values = 1 + 0.1 * values if len(shape) == 1 else values * (2 / shape[1]) ** 0.5
        return values.to(getattr(torch, dtype))

    return {name: random(shape) for name, shape in shapes.items()}


def _save_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    from safetensors.torch import save_file

    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        own = names[number::num_shards]
        save_file({name: tensors[name] for name in own}, folder / shard)
        weight_map |= dict.fromkeys(own, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shared_folder(name: str) -> Path:
    folder = REPO_ROOT.parent / "shared" / name
    if folder.is_dir():
        return folder
    reason = f"../shared/{name} is not there"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and with CI=true it must be")
    pytest.skip(reason)
