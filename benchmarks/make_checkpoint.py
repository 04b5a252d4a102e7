"""Write a checkpoint folder with the shape of a published model and random weights: for speed, not for answers.

python -m benchmarks.make_checkpoint FOLDER [--model ERNIE-4.5-0.3B-PT] [--layers N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernie45 import catalogue
from ernie45.backends.base import BuildOptions
from ernie45.backends.registry import find_architecture
from ernie45.commands.transformers_config import transformers_config
from ernie45.spec import ModelSpec, parse_spec

WEIGHT_STD = 0.02
SEED = 0
_LAYER_PREFIXES = ("model.layers.", "vision_model.blocks.")


def make_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write config.json and shards (the same bytes every time); returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    spec = parse_spec(config)
    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    shapes = _shapes(config, spec)
    for number, (_, names) in enumerate(groupby(shapes, key=_shard_of)):
        tensors = {name: _values(name, shapes[name], generator, spec) for name in names}
        file_name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return num_bytes


def _shapes(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a build asks for, by name, in torch's orientation."""
    source = _Recorder()
    options = BuildOptions.unquantised(spec, dtype=torch.bfloat16, device="meta")
    find_architecture(config).build(spec, source, options)
    return source.shapes


@final
class _Recorder:
    """A source of tensors that has none, and notes what is asked for."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: object) -> bool:
        return False

    def read_into(self, out: Tensor, parts: Mapping[str, int]) -> None:
        self.shapes |= {name: (num_rows, *out.shape[1:]) for name, num_rows in parts.items()}


def _shard_of(name: str) -> str:
    """A shard for each layer, so that no more than one is in memory; what is in none goes with its neighbours."""
    for prefix in _LAYER_PREFIXES:
        if name.startswith(prefix):
            return prefix + name.removeprefix(prefix).partition(".")[0]
    return ""


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator, spec: ModelSpec) -> Tensor:
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        is_bias = name.endswith(".bias")
        return (torch.zeros if is_bias else torch.ones)(shape, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator) * WEIGHT_STD
    if ".mlp.gate.weight" not in name:
        return values.bfloat16()
    return values if spec.vision is None else values.T.contiguous()  # the routers of these lie the other way round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--model", default="ERNIE-4.5-0.3B-PT", help="a model's name in the catalogue")
    parser.add_argument("--layers", type=int, help="fewer than the model has: a cut that fits")
    options = parser.parse_args()
    entry = catalogue.find(options.model)
    if entry is None:
        parser.error(f"no model {options.model!r}. {catalogue.did_you_mean(options.model)}")
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    spec = parse_spec({**entry.config, **layers})
    config = transformers_config(spec, tied=spec.tied is not False, dtype="bfloat16", pad_token_id=0, media_ids={})
    weight_bytes = make_checkpoint(options.folder, config)
    print(f"{options.folder}: {spec.num_layers} layers, {weight_bytes / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
