"""Write a checkpoint folder with the shape of ERNIE-4.5-0.3B-PT and random weights: for speed, not for answers.

python -m benchmarks.make_checkpoint FOLDER [--layers N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# The numbers of the published config.json, as far as they matter to a reader of it.
CONFIG_03B = {
    "architectures": ["Ernie4_5ForCausalLM"],
    "model_type": "ernie4_5",
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "max_position_embeddings": 131072,
    "use_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WEIGHT_STD = 0.02
SEED = 0


def make_checkpoint(folder: Path, *, num_layers: int) -> int:
    """Write config.json and model.safetensors (bf16, the same bytes every time); returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG_03B, "num_hidden_layers": num_layers}, indent=2))
    generator = torch.Generator().manual_seed(SEED)
    tensors = {name: _values(shape, generator) for name, shape in _shapes(num_layers)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def _shapes(num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocab = 1024, 3072, 103424
    query, kv = 16 * 128, 2 * 128
    yield "model.embed_tokens.weight", (vocab, hidden)
    for prefix in (f"model.layers.{index}." for index in range(num_layers)):
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * WEIGHT_STD).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--layers", type=int, default=18, help="fewer than 18 give a toy to try the scripts with")
    options = parser.parse_args()
    weight_bytes = make_checkpoint(options.folder, num_layers=options.layers)
    print(f"{options.folder}: {options.layers} layers, {weight_bytes / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
