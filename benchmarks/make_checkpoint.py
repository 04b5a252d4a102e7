"""Write a checkpoint folder with the shape of a published text model and random weights: for speed, not for answers.

python -m benchmarks.make_checkpoint FOLDER [--model ERNIE-4.5-0.3B-PT] [--layers N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernie45 import catalogue
from ernie45.spec import ExpertSpec, ModelSpec, parse_spec

WEIGHT_STD = 0.02
SEED = 0


def make_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write config.json and shards (the same bytes every time); returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    spec = parse_spec(config)
    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, part in enumerate(_shards(spec)):
        tensors = {name: _values(name, shape, generator) for name, shape in part}
        file_name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def _shards(spec: ModelSpec) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    table = (spec.vocab_size, spec.hidden_size)
    head = [] if spec.tied else [("lm_head.weight", table)]
    yield [("model.embed_tokens.weight", table), ("model.norm.weight", (spec.hidden_size,)), *head]
    for layer in range(spec.num_layers):
        yield list(_layer(spec, layer))


def _layer(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.{layer}."
    hidden, query, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    for name, shape in {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}.items():
        yield f"{prefix}self_attn.{name}_proj.weight", shape
    if spec.experts is None or not spec.experts.in_layer(layer):
        yield from _mlp(prefix + "mlp.", hidden, spec.intermediate_size)
    else:
        yield from _expert_mlp(prefix + "mlp.", hidden, spec.experts)


def _expert_mlp(prefix: str, hidden: int, experts: ExpertSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate.weight", (experts.num_experts, hidden)
    yield prefix + "moe_statics.e_score_correction_bias", (1, experts.num_experts)
    for number in range(experts.num_experts):
        yield from _mlp(f"{prefix}experts.{number}.", hidden, experts.intermediate_size)
    if experts.num_shared_experts:
        yield from _mlp(prefix + "shared_experts.", hidden, experts.num_shared_experts * experts.intermediate_size)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator) * WEIGHT_STD
    return values if name.endswith("mlp.gate.weight") else values.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--model", default="ERNIE-4.5-0.3B-PT", help="a text model's name in the catalogue")
    parser.add_argument("--layers", type=int, help="fewer than the model has: a cut that fits")
    options = parser.parse_args()
    entry = catalogue.find(options.model)
    if entry is None:
        parser.error(f"no model {options.model!r}. {catalogue.did_you_mean(options.model)}")
    config = {**entry.config, "torch_dtype": "bfloat16"}
    if options.layers:
        config["num_hidden_layers"] = options.layers
    weight_bytes = make_checkpoint(options.folder, config)
    print(f"{options.folder}: {config['num_hidden_layers']} layers, {weight_bytes / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
