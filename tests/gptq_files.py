"""Writes GPTQ checkpoints by the rule that AutoGPTQ published and GPTQModel keeps; no code of the package is used, so
that a mistake there shows.

Rounding is to nearest: GPTQ's own choice of codes matters to quality, not to how they are stored.
https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear: `pack_original`, `dequantize_weight`)
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Order = Literal["stored", "shared", "separate"]
"""Groups of neighbours; act-order, one for all matrices of the same inputs; act-order, one for each matrix."""

_QUANTISED = re.compile(r"model\.layers\.\d+\..*_proj\.weight")
_OF_OTHER_INPUTS = ("o_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqMatrix:
    """The tensors of one matrix, and the `values` float32 [N, K] that they stand for."""

    tensors: Mapping[str, npt.NDArray[Any]]
    values: FloatArray


def group_index(num_inputs: int, group_size: int, *, seed: int | None = None) -> IntArray:
    """The group of each input [K]: neighbours, or with a seed inputs drawn at random."""
    groups = np.arange(num_inputs, dtype=np.int32) // group_size
    if seed is None:
        return groups
    mixed = np.empty_like(groups)
    mixed[np.random.RandomState(seed).permutation(num_inputs)] = groups
    return mixed


def quantise(weight: FloatArray, g_idx: IntArray, *, symmetric: bool = True, version: Literal[1, 2] = 1) -> GptqMatrix:
    """Round a weight [N, K]. Version 1 is the format "gptq", 2 is "gptq_v2"."""
    num_groups = int(g_idx.max()) + 1
    scales = np.empty((num_groups, len(weight)), dtype=np.float16)
    zeros = np.full(scales.shape, 8, dtype=np.uint32)
    for group in range(num_groups):
        values = weight[:, g_idx == group]
        lowest, highest = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        if symmetric:
            scales[group] = 2 * np.maximum(-lowest, highest) / 15
        else:
            scales[group] = (highest - lowest) / 15
            zeros[group] = np.clip(np.round(-lowest / scales[group].astype(np.float32)), 0, 15)
    steps, middles = scales.astype(np.float32)[g_idx], zeros.astype(np.float32)[g_idx]  # [K, N]
    codes = np.clip(np.round(weight.T / steps) + middles, 0, 15).astype(np.uint32)
    zero_words = _words(zeros.T).T
    if version == 1:
        zero_words = zero_words - np.uint32(0x11111111)  # the whole word: a zero of 0 borrows from the next
    tensors: dict[str, npt.NDArray[Any]] = {
        "qweight": _words(codes).view(np.int32),
        "qzeros": np.ascontiguousarray(zero_words).view(np.int32),
        "scales": scales,
        "g_idx": g_idx,
    }
    return GptqMatrix(tensors=tensors, values=np.ascontiguousarray(((codes - middles) * steps).T))


def _words(codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """[8R, C] -> [R, C]: row 8r + i is bits 4i to 4i + 3 of word r."""
    words = np.zeros((len(codes) // 8, codes.shape[1]), dtype=np.uint32)
    for place in range(8):
        words |= codes[place::8] << np.uint32(4 * place)
    return words


def write_gptq_folder(
    source: Path,
    folder: Path,
    reference: Path,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    order: Order = "stored",
    version: Literal[1, 2] = 1,
    plain: str = "",
) -> None:
    """Quantise a float32 -PT folder into `folder`, and write to `reference` what its weights stand for, in float32.

    Embedding, head, norms and routers stay as they are, and with `plain` the modules that have it in their names.
    """
    stored: dict[str, npt.NDArray[Any]] = {}
    values: dict[str, npt.NDArray[Any]] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if _QUANTISED.fullmatch(name) is None or (plain and plain in name):
            stored[name] = values[name] = weight
            continue
        g_idx = group_index(
            weight.shape[1],
            weight.shape[1] if group_size == -1 else group_size,
            seed=None if order == "stored" else _seed(module, order),
        )
        matrix = quantise(weight, g_idx, symmetric=symmetric, version=version)
        stored |= {f"{module}.{part}": tensor for part, tensor in matrix.tensors.items()}
        values[name] = matrix.values
    config = json.loads((source / "config.json").read_text())
    quantization = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": order != "stored",
        "sym": symmetric,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    for target, tensors, said in (
        (folder, stored, {**config, "quantization_config": quantization}),
        (reference, values, config),
    ):
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(said))
        save_file(tensors, target / "model.safetensors")


def _seed(module: str, order: Order) -> int:
    parent, _, leaf = module.rpartition(".")
    inputs = leaf if order == "separate" or leaf in _OF_OTHER_INPUTS else ""
    return zlib.crc32(f"{parent}.{inputs}".encode())
