from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ernie45.checkpoint.headers import CheckpointIndex, TensorInfo, read_headers
from ernie45.checkpoint.quantized_releases import refuse_by_config, refuse_by_name, refuse_by_tensors
from ernie45.errors import UnsupportedError

UNQUANTISED_300B = ("baidu/ERNIE-4.5-300B-A47B-PT", "baidu/ERNIE-4.5-300B-A47B-Paddle", "baidu/ERNIE-4.5-21B-A3B-PT")

TWO_BITS = ("to 2 bits", "7 to 53", "3 to 6", "8-bit dense", "CUTLASS")
TWO_BITS_SPLIT = ("2 bits and split", "files of each GPU", "axes")
FP8 = ("FP8", "not confirmed", "Hadamard")
W4A8C8 = ("W4A8C8", "half of a byte", "CUTLASS", "stretched", "4 GPUs")
UNKNOWN = ("quantised (", "ernie45 does not read this format yet")

PUBLISHED = {
    "ERNIE-4.5-300B-A47B-2Bits-Paddle": TWO_BITS,
    "ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle": TWO_BITS_SPLIT,
    "ERNIE-4.5-300B-A47B-2Bits-TP4-Paddle": TWO_BITS_SPLIT,
    "ERNIE-4.5-300B-A47B-FP8-Paddle": FP8,
    "ERNIE-4.5-300B-A47B-W4A8C8-TP4-Paddle": W4A8C8,
}

# What FastDeploy's documentation shows of the 2-bit release.
TWO_BIT_CONFIG: dict[str, Any] = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {"moe_w2_quant_config": {"quant_type": "wint2", "quant_start_layer": 7}},
}

MIXED: dict[str, Any] = {"quantization": "mix_quant", "dense_quant_type": "wint8"}


def refusal(refuse: Callable[..., None], *arguments: object) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        refuse(*arguments)
    return caught.value


def check(error: UnsupportedError, subject: str, texts: tuple[str, ...]) -> None:
    assert error.message.startswith(f"{subject} is quantised")
    assert [text for text in texts if text not in error.message] == []
    alternatives = UNQUANTISED_300B if texts is not UNKNOWN else ("unquantised release", "baidu/ERNIE-4.5-21B-A3B-PT")
    assert [text for text in alternatives if text not in error.hint] == []


@pytest.mark.parametrize("spelling", ["{}", "baidu/{}", "PaddlePaddle/{}", " {} "])
@pytest.mark.parametrize("case", [str, str.lower, str.upper])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_refused(name: str, case: Callable[[str], str], spelling: str) -> None:
    spelt = case(spelling.format(name))
    check(refusal(refuse_by_name, spelt), spelt.strip(), PUBLISHED[name])


@pytest.mark.parametrize(
    "name",
    [
        *UNQUANTISED_300B,
        "ERNIE-4.5-0.3B-Paddle",
        "ernie45/tiny-dense",
        "someone/ERNIE-4.5-300B-A47B-FP8-Paddle",  # somebody else's: its config tells
        "./ERNIE-4.5-300B-A47B-FP8-Paddle",
        "",
    ],
)
def test_other_names_pass(name: str) -> None:
    refuse_by_name(name)


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        ({"quantization_config": TWO_BIT_CONFIG, "is_quantized": True}, (*TWO_BITS, "moe_quant_type 'w4w2'")),
        ({"quantization_config": {"quantization": "wint2"}}, TWO_BITS),
        (TWO_BIT_CONFIG, TWO_BITS),
        ({"quantization_config": MIXED | {"moe_quant_type": "w4a8", "kv_cache_quant_type": "int8"}}, W4A8C8),
        ({"quantization_config": MIXED | {"moe_quant_type": "tensor_wise_fp8"}}, FP8),
        ({"quantization_config": {"quantization": "block_wise_fp8"}}, FP8),
        ({"quantization_config": MIXED | {"moe_quant_type": "wint4"}}, (*UNKNOWN, "moe_quant_type 'wint4'")),
        ({"quantization_config": {"kv_cache_quant_type": "int8"}}, (*UNKNOWN, "kv_cache_quant_type 'int8'")),
        ({"is_quantized": True}, (*UNKNOWN, "is_quantized True")),
        ({"is_moe_quantized": True}, (*UNKNOWN, "is_moe_quantized True")),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, (*UNKNOWN, "quant_method 'awq'")),
        ({"quantization_config": {"quant_method": "fp8"}}, (*UNKNOWN, "quant_method 'fp8'")),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, UNKNOWN),
        ({"quantization_config": {"bits": 4}}, (*UNKNOWN, "{'bits': 4}")),
        ({"quantization_config": "int4"}, (*UNKNOWN, "'int4'")),
        ({"quantization_config": {"quantization": ["wint2"]}}, (*UNKNOWN, "['wint2']")),
    ],
)
def test_quantised_configs_are_refused(config: dict[str, Any], texts: tuple[str, ...]) -> None:
    error = refusal(refuse_by_config, {"model_type": "ernie4_5_moe"} | config, "some/model")
    assert "config.json" in error.message
    check(error, "some/model", UNKNOWN if texts[0] == UNKNOWN[0] else texts)
    assert [text for text in texts if text not in error.message] == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": False},
        {"quantization_config": {"is_quantized": False, "quantization": "", "weight_quantize_algo": None}},
        {"is_quantized": False, "is_moe_quantized": False, "dense_quant_type": ""},
    ],
)
def test_unquantised_configs_pass(config: dict[str, Any]) -> None:
    refuse_by_config({"model_type": "ernie4_5"} | config, "some/model")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_gptq_weights_pass_if_they_can_be_read() -> None:
    refuse_by_config({"quantization_config": GPTQ}, "some/model")
    error = refusal(refuse_by_config, {"quantization_config": GPTQ | {"bits": 8}}, "some/model")
    assert "bits is 8" in error.message
    assert "or a 4-bit GPTQ one" in refusal(refuse_by_config, {"is_quantized": True}, "some/model").hint


FOLDER = Path("model")
EXPERT = "ernie.layers.7.mlp.experts.0.up_gate_proj"
PLAIN = {"ernie.embed_tokens.weight": ("BF16", (512, 64)), "ernie.norm.weight": ("BF16", (64,))}


def index_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> CheckpointIndex:
    infos = {
        name: TensorInfo(name=name, file=FOLDER / "model.safetensors", dtype=dtype, shape=shape, start=0, num_bytes=0)
        for name, (dtype, shape) in {**PLAIN, **tensors}.items()
    }
    return CheckpointIndex(folder=FOLDER, tensors=infos, metadata={})


@pytest.mark.parametrize(
    ("tensors", "texts"),
    [
        # A 2-bit release: 8-bit dense weights come first, and its group scales are 2-D as FP8's block scales are.
        (
            {
                "ernie.layers.0.mlp.down_proj.quant_weight": ("I8", (64, 128)),
                "ernie.layers.0.mlp.down_proj.weight_scale": ("F32", (64,)),
                f"{EXPERT}.quant_weight": ("U8", (32, 8)),
                f"{EXPERT}.weight_scale": ("U8", (4, 8)),
                f"{EXPERT}.super_scales": ("BF16", (8,)),
            },
            (*TWO_BITS, f"{EXPERT}.super_scales", "BF16 [8]"),
        ),
        ({f"{EXPERT}.super_scale": ("BF16", (8,))}, TWO_BITS),
        ({f"{EXPERT}.code_scale": ("F32", (8,))}, TWO_BITS),
        ({f"{EXPERT}.code_zp": ("F32", (8,))}, TWO_BITS),
        (
            {
                f"{EXPERT}.quant_weight": ("I8", (32, 8)),
                f"{EXPERT}.weight_scale": ("F32", (8,)),
                f"{EXPERT}.activation_scale": ("F32", (1,)),
            },
            W4A8C8,
        ),
        ({"ernie.layers.0.self_attn.cachek_matmul.activation_scale": ("BF16", (8,))}, W4A8C8),
        ({"ernie.layers.0.self_attn.cachev_matmul.activation_zero_point": ("BF16", (8,))}, W4A8C8),
        (
            {
                f"{EXPERT}.quant_weight": ("I8", (256, 256)),
                f"{EXPERT}.weight_scale": ("F32", ()),
                f"{EXPERT}.activation_scale": ("F32", ()),
            },
            FP8,
        ),
        ({f"{EXPERT}.quant_weight": ("I8", (256, 256)), f"{EXPERT}.weight_scale": ("F32", (2, 2))}, FP8),
        ({f"{EXPERT}.quant_weight": ("F8_E4M3", (256, 256))}, FP8),
        ({f"{EXPERT}.quant_weight": ("I8", (32, 8))}, UNKNOWN),
        ({f"{EXPERT}.weight_scale": ("F32", (8,))}, UNKNOWN),
        ({f"{EXPERT}.weight_scale": ("F32", (1, 8))}, UNKNOWN),
        *(({f"{EXPERT}.weight": (dtype, (32, 8))}, UNKNOWN) for dtype in ("F8_E4M3", "F8_E5M2", "U8", "I8")),
        ({"weight": ("I8", (32, 8))}, UNKNOWN),
    ],
)
def test_quantised_tensors_are_refused(tensors: dict[str, tuple[str, tuple[int, ...]]], texts: tuple[str, ...]) -> None:
    check(refusal(refuse_by_tensors, index_of(tensors)), str(FOLDER), texts)


def test_plain_tensors_pass() -> None:
    # U16 carries the bits of bf16 in Paddle's files.
    others = {dtype: (dtype, (8, 8)) for dtype in ("U8", "BOOL", "I64")}
    weights = {f"layers.{dtype}.weight": (dtype, (8, 8)) for dtype in ("BF16", "F16", "F32", "U16")}
    refuse_by_tensors(index_of(others | weights))


def test_headers_of_a_file_are_enough(tmp_path: Path) -> None:
    tensors = {f"{EXPERT}.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "ernie.norm.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    check(refusal(refuse_by_tensors, read_headers(tmp_path)), str(tmp_path), UNKNOWN)


def test_a_refusal_reads_as_two_sentences() -> None:
    assert str(refusal(refuse_by_name, "baidu/ERNIE-4.5-300B-A47B-FP8-Paddle")) == (
        "baidu/ERNIE-4.5-300B-A47B-FP8-Paddle is quantised to FP8: whether it has one scale per tensor or per "
        "128 x 128 block is not confirmed, and with one per tensor the weights may be Hadamard-rotated, which would "
        "give wrong answers without an error\n"
        "  -> load 'baidu/ERNIE-4.5-300B-A47B-PT' or 'baidu/ERNIE-4.5-300B-A47B-Paddle', the same model unquantised, "
        "or the smaller 'baidu/ERNIE-4.5-21B-A3B-PT'"
    )
