"""Writes -PT tensors the way Paddle's code lays them out, by the table of the fixtures' README; no layout code of the
package is used, so that a mistake there shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
FileLayout = Literal["pt", "paddle", "paddleformers"]
FloatDtype = Literal["F32", "BF16", "U16"]

CONFIG: dict[str, Any] = {
    "model_type": "ernie4_5",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 12,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
}
_SIGNS: dict[FileLayout, dict[str, str]] = {
    "pt": {},
    "paddle": {"paddleformers_version": "0.1"},
    "paddleformers": {"paddleformers_version": "1.2.0", "source": "paddle"},
}
_FUSED_LATER = (".k_proj.", ".v_proj.", ".up_proj.")
_TRANSPOSED = (".o_proj.weight", ".down_proj.weight", ".mlp.gate.weight")
_STAYS_F32 = (".mlp.gate.weight", ".mlp.gate.weight_1", ".e_score_correction_bias")


def random_pt(config: Mapping[str, Any], *, expert_biases: bool = False, mtp: bool = False) -> dict[str, Array]:
    """Every -PT tensor of a text config, with random values that bf16 holds exactly."""
    hidden = config["hidden_size"]
    linears: dict[str, tuple[int, int, bool]] = {}
    vectors = ["model.norm"]
    raw: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    blocks = [f"model.layers.{index}" for index in range(config["num_hidden_layers"])]
    for index, block in enumerate([*blocks, *["model.mtp_block.0"] * mtp]):
        linears |= _attention(block, config)
        vectors += [f"{block}.input_layernorm", f"{block}.post_attention_layernorm"]
        if block in blocks and _has_experts(config, index):
            num_experts, width = config["moe_num_experts"], config["moe_intermediate_size"]
            for number in range(num_experts):
                linears |= _mlp(f"{block}.mlp.experts.{number}", hidden, width, expert_biases)
            if config["moe_num_shared_experts"]:
                shared = width * config["moe_num_shared_experts"]
                linears |= _mlp(f"{block}.mlp.shared_experts", hidden, shared, config["use_bias"])
            raw[f"{block}.mlp.gate.weight"] = (num_experts, hidden)
            if config["moe_use_aux_free"]:
                raw[f"{block}.mlp.moe_statics.e_score_correction_bias"] = (1, num_experts)
        else:
            linears |= _mlp(f"{block}.mlp", hidden, config["intermediate_size"], config["use_bias"])
    if mtp:
        vectors += ["model.mtp_emb_norm.0", "model.mtp_hidden_norm.0"]
        raw["model.mtp_linear_proj.0.weight"] = (hidden, 2 * hidden)
    if not config["tie_word_embeddings"]:
        raw["lm_head.weight"] = (config["vocab_size"], hidden)
    if config["use_bias"]:
        raw["lm_head.bias"] = (config["vocab_size"],)
    for name, (rows, columns, has_bias) in linears.items():
        raw[f"{name}.weight"] = (rows, columns)
        if has_bias:
            raw[f"{name}.bias"] = (rows,)
    raw |= {f"{name}.weight": (hidden,) for name in vectors}
    generator = np.random.RandomState(7)
    tensors = {name: (0.2 * generator.standard_normal(shape)).astype(np.float32) for name, shape in raw.items()}
    return {name: _bf16_bits_to_float(_bf16_bits(values)) for name, values in tensors.items()}


def _attention(block: str, config: Mapping[str, Any]) -> dict[str, tuple[int, int, bool]]:
    hidden, has_bias = config["hidden_size"], config["use_bias"]
    query, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    return {
        f"{block}.self_attn.q_proj": (query, hidden, has_bias),
        f"{block}.self_attn.k_proj": (kv, hidden, has_bias),
        f"{block}.self_attn.v_proj": (kv, hidden, has_bias),
        f"{block}.self_attn.o_proj": (hidden, query, has_bias),
    }


def _mlp(name: str, hidden: int, width: int, has_bias: bool) -> dict[str, tuple[int, int, bool]]:
    return {
        f"{name}.gate_proj": (width, hidden, has_bias),
        f"{name}.up_proj": (width, hidden, has_bias),
        f"{name}.down_proj": (hidden, width, has_bias),
    }


def _has_experts(config: Mapping[str, Any], index: int) -> bool:
    if config["model_type"] != "ernie4_5_moe":
        return False
    is_inside = config["moe_layer_start_index"] <= index <= config["moe_layer_end_index"]
    return bool(is_inside and (index + 1) % config["moe_layer_interval"] == 0)


def lay_out(tensors: Mapping[str, Array], config: Mapping[str, Any], layout: FileLayout) -> dict[str, Array]:
    """-PT tensors -> the tensors that a file of this layout holds."""
    if layout == "pt":
        return dict(tensors)
    stored: dict[str, Array] = {}
    for name, values in tensors.items():
        key = name.replace("model.", "ernie.", 1) if layout == "paddle" and name.startswith("model.") else name
        if ".q_proj." in name:
            qkv = [tensors[name.replace("q_proj", f"{kind}_proj")].T for kind in "qkv"]
            stored[key.replace("q_proj", "qkv_proj")] = _fuse_qkv(qkv, config, layout)
        elif ".gate_proj." in name:
            up = tensors[name.replace("gate_proj", "up_proj")]
            stored[key.replace("gate_proj", "up_gate_proj")] = np.concatenate([values.T, up.T], axis=-1)
        elif name.endswith(_TRANSPOSED) or ".mtp_linear_proj." in name:
            stored[key] = values.T
        elif name == "lm_head.weight":
            stored[key] = values.T if layout == "paddle" else values
        elif not any(part in name for part in _FUSED_LATER):
            stored[key] = values
    if config["tie_word_embeddings"]:
        stored["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return stored


def _fuse_qkv(qkv: list[Array], config: Mapping[str, Any], layout: FileLayout) -> Array:
    """Weights [in, out], or biases, into one along their last axis."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if layout == "paddle" and num_heads != num_kv_heads:
        return np.concatenate(qkv, axis=-1)
    grouped = [part.reshape(*part.shape[:-1], num_kv_heads, -1) for part in qkv]
    return np.concatenate(grouped, axis=-1).reshape(*qkv[0].shape[:-1], -1)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    layout: FileLayout,
    dtype: FloatDtype = "F32",
    num_shards: int = 1,
) -> Path:
    """Write -PT tensors and a config as a checkpoint folder of this layout."""
    stored = lay_out(tensors, config, layout)
    return write_stored(folder, stored, {**config, **_SIGNS[layout]}, dtype=dtype, num_shards=num_shards)


def write_stored(
    folder: Path,
    stored: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    dtype: FloatDtype = "F32",
    num_shards: int = 1,
) -> Path:
    """Write tensors under the names and in the orientation given; the router and its correction stay F32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        write_file(folder / "model.safetensors", stored, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        own = list(stored)[number::num_shards]
        write_file(folder / file, {name: stored[name] for name in own}, dtype)
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_file(path: Path, stored: Mapping[str, Array], dtype: FloatDtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    data = b""
    for name, values in stored.items():
        stays_f32 = dtype == "F32" or name.endswith(_STAYS_F32)
        content = values.tobytes() if stays_f32 else _bf16_bits(values).tobytes()  # tobytes() is row-major
        header[name] = {
            "dtype": "F32" if stays_f32 else dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _bf16_bits(values: Array) -> npt.NDArray[np.uint16]:
    """The upper halves: bf16 by cutting off, which changes no value that bf16 holds exactly."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def _bf16_bits_to_float(bits: npt.NDArray[np.uint16]) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
