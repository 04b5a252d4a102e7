"""Decoding against numbers worked out by hand, and against the published rules in scalar arithmetic."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import TensorError
from ernie45.quantization.paddle import decode_block_fp8, decode_tensor_fp8, decode_two_bit_expert


def two_bit_weight(byte: int, group_scale: int, super_scale: float, code_scale: float, code_zp: float) -> list[float]:
    """The four weights of one byte by the published rule, reading the word as a row of binary digits."""
    word = math.floor(np.float32(byte) * np.float32(code_scale) + np.float32(code_zp) + np.float32(0.5))
    digits = format(word % 2**15, "015b")
    windows = [digits[0:6], digits[3:9], digits[6:12], digits[9:15]]
    scale = np.float32(group_scale) * np.float32(super_scale)
    return [float(np.float32(int(window, 2) - 32) * scale) for window in windows]


def two_bit_expert(num_rows: int, num_columns: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A random 2-bit matrix as stored, and what it stands for. Not every weight can be encoded (neighbours share
    bits), so the bytes are drawn and the weights follow."""
    draw = random.Random(seed)
    stored = {
        "quant_weight": torch.zeros(num_rows // 4, num_columns, dtype=torch.uint8),
        "weight_scale": torch.zeros(num_rows // 128, num_columns, dtype=torch.uint8),
        "super_scales": torch.tensor([draw.uniform(1e-4, 0.1) for _ in range(num_columns)]).bfloat16(),
        "code_scale": torch.tensor([draw.uniform(-130, 130) for _ in range(num_columns)]),
        "code_zp": torch.tensor([draw.uniform(-100, 33000) for _ in range(num_columns)]),
    }
    expected = torch.zeros(num_rows, num_columns)
    for column in range(num_columns):
        scales = [draw.randrange(16) for _ in range(num_rows // 64)]
        for pair in range(num_rows // 128):
            stored["weight_scale"][pair, column] = scales[2 * pair] * 16 + scales[2 * pair + 1]
        per_column = [stored[name][column].item() for name in ("super_scales", "code_scale", "code_zp")]
        for row in range(0, num_rows, 4):
            byte = draw.randrange(256)
            stored["quant_weight"][row // 4, column] = byte
            expected[row : row + 4, column] = torch.tensor(two_bit_weight(byte, scales[row // 64], *per_column))
    return stored, expected


def constant_expert(byte: int, scales: int, super_scale: float, code_scale: float, code_zp: float) -> torch.Tensor:
    """128 rows of one column with the same byte throughout."""
    return decode_two_bit_expert(
        torch.full((32, 1), byte, dtype=torch.uint8),
        torch.full((1, 1), scales, dtype=torch.uint8),
        torch.tensor([super_scale]),
        torch.tensor([code_scale]),
        torch.tensor([code_zp]),
    )


def test_two_bits_by_hand() -> None:
    # 100 · 128 + 0.25 + 0.5 -> 12800 = 0b011001000000000: windows 011001, 001000, 000000, 000000 less 32.
    weight = constant_expert(100, 0x3A, 0.5, 128.0, 0.25)
    assert weight.dtype == torch.float32
    assert weight.shape == (128, 1)
    assert weight[:4, 0].tolist() == [-7 * 1.5, -24 * 1.5, -32 * 1.5, -32 * 1.5]  # even group: high half, 3
    assert weight[64:68, 0].tolist() == [-7 * 5.0, -24 * 5.0, -32 * 5.0, -32 * 5.0]  # odd group: low half, 10


def test_two_bit_windows_overlap() -> None:
    # 0b000111000111000: windows 000111, 111000, 000111, 111000
    word = 0b000111000111000
    assert constant_expert(1, 0x11, 1.0, float(word), 0.0)[:4, 0].tolist() == [7 - 32, 56 - 32, 7 - 32, 56 - 32]


@pytest.mark.parametrize(
    ("byte", "code_zp", "fields"),
    [
        (3, 0.5, [-32, -32, -32, 4 - 32]),  # 3 + 0.5 + 0.5: a half goes up
        (3, 0.25, [-32, -32, -32, 3 - 32]),
        (1, -5.0, [31, 31, 31, 60 - 32]),  # floor(-3.5) is -4, all ones but the last two bits
        (0, 2.0**15 + 1, [-32, -32, -32, 1 - 32]),  # bits above the word's fifteen are dropped
    ],
)
def test_two_bit_words_are_rounded_down_after_adding_a_half(byte: int, code_zp: float, fields: list[float]) -> None:
    assert constant_expert(byte, 0x11, 1.0, 1.0, code_zp)[:4, 0].tolist() == fields


@settings(max_examples=20, deadline=None)
@given(num_pairs=st.integers(1, 7), num_columns=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_two_bits_follow_the_published_rule(num_pairs: int, num_columns: int, seed: int) -> None:
    stored, expected = two_bit_expert(128 * num_pairs, num_columns, seed)
    assert torch.equal(decode_two_bit_expert(**stored), expected)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 3), (128, 0)])
def test_empty_two_bit_matrices_stay_empty(num_rows: int, num_columns: int) -> None:
    stored, expected = two_bit_expert(num_rows, num_columns, seed=0)
    assert torch.equal(decode_two_bit_expert(**stored), expected)


def test_two_bits_take_transposed_memory() -> None:
    stored, expected = two_bit_expert(256, 3, seed=1)
    stored["quant_weight"] = stored["quant_weight"].t().contiguous().t()
    assert torch.equal(decode_two_bit_expert(**stored), expected)


def test_two_bits_need_little_memory_beside_the_result() -> None:
    num_rows, num_columns = 8192, 64
    stored = {
        "quant_weight": torch.zeros(num_rows // 4, num_columns, dtype=torch.uint8),
        "weight_scale": torch.zeros(num_rows // 128, num_columns, dtype=torch.uint8),
        **{name: torch.ones(num_columns) for name in ("super_scales", "code_scale", "code_zp")},
    }
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        decode_two_bit_expert(**stored)
    allocated = sorted(event.cpu_memory_usage for event in profile.function_events)
    assert allocated[-1] == num_rows * num_columns * 4
    assert allocated[-2] <= allocated[-1] // 16


BYTES = torch.uint8


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        ("quant_weight", torch.zeros(32, 3, dtype=torch.int8), ("quant_weight", "int8", "uint8")),
        ("quant_weight", torch.zeros(1, 32, 3, dtype=BYTES), ("quant_weight", "[1, 32, 3]")),
        ("quant_weight", torch.zeros(16, 3, dtype=BYTES), ("quant_weight", "64 rows", "128")),
        ("weight_scale", torch.zeros(2, 3, dtype=BYTES), ("weight_scale", "[2, 3]", "[1, 3]")),
        ("weight_scale", torch.zeros(1, 3), ("weight_scale", "float32", "uint8")),
        ("super_scales", torch.zeros(1, 3), ("super_scales", "[1, 3]", "[3]")),
        ("super_scales", torch.zeros(3, dtype=torch.int16), ("super_scales", "int16", "bfloat16")),
        ("code_scale", torch.zeros(3, dtype=torch.float16), ("code_scale", "float16", "float32")),
        ("code_scale", torch.tensor([1.0, math.nan, 1.0]), ("column 1", "nan")),
        ("code_scale", torch.tensor([1.0, 1.0, 1e8]), ("column 2", "100000000.0", "byte 255")),
        ("code_zp", torch.zeros(4), ("code_zp", "[4]", "[3]")),
        ("code_zp", torch.tensor([math.inf, 0.0, 0.0]), ("column 0", "inf")),
    ],
)
def test_two_bits_refuse_other_shapes_and_dtypes(name: str, tensor: torch.Tensor, parts: tuple[str, ...]) -> None:
    stored, _ = two_bit_expert(128, 3, seed=0)
    with pytest.raises(TensorError) as caught:
        decode_two_bit_expert(**{**stored, name: tensor})
    assert all(part in caught.value.message for part in parts)
    assert caught.value.hint


def e4m3(byte: int) -> float:
    """One byte of FP8: a sign, four bits of exponent with bias 7, three of mantissa; no infinity, and two NaNs."""
    exponent, mantissa = byte // 8 % 16, byte % 8
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >= 128 else size


ALL_BYTES = torch.arange(256).to(torch.uint8).view(16, 16)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_every_fp8_byte(stored: torch.dtype) -> None:
    decoded = decode_tensor_fp8(ALL_BYTES.view(stored), torch.tensor(1.0))
    expected = torch.tensor([e4m3(byte) for byte in range(256)]).view(16, 16)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert decoded.isnan().sum() == 2


def test_fp8_by_hand() -> None:
    weight = torch.tensor([[0x38, 0xC0, 0x7E, 0x01]], dtype=torch.uint8)  # 1, -2, 448 and 2^-9
    assert decode_tensor_fp8(weight, torch.tensor([0.5])).tolist() == [[0.5, -1.0, 224.0, 2.0**-10]]


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25).bfloat16()])
def test_one_scale_multiplies_every_fp8_weight(scale: torch.Tensor) -> None:
    decoded = decode_tensor_fp8(ALL_BYTES.view(torch.int8), scale)
    assert decoded.dtype == torch.float32
    expected = torch.tensor([e4m3(byte) / 4 for byte in range(256)]).view(16, 16)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(128, 128), (256, 200), (300, 130), (1, 129), (127, 1), (0, 5)])
def test_each_fp8_block_has_its_scale(shape: tuple[int, int]) -> None:
    num_rows, num_columns = shape
    draw = random.Random(7)
    scales = [[draw.uniform(0.01, 2) for _ in range(-(-num_columns // 128))] for _ in range(-(-num_rows // 128))]
    codes = [[draw.randrange(126) for _ in range(num_columns)] for _ in range(num_rows)]
    expected = [
        [
            float(np.float32(e4m3(code)) * np.float32(scales[row // 128][column // 128]))
            for column, code in enumerate(line)
        ]
        for row, line in enumerate(codes)
    ]
    weight = torch.tensor(codes, dtype=torch.uint8).view(shape)
    scale = torch.tensor(scales).view(-(-num_rows // 128), -(-num_columns // 128))
    for stored in (torch.float8_e4m3fn, torch.int8):
        assert torch.equal(decode_block_fp8(weight.view(stored), scale), torch.tensor(expected).view(shape))


@pytest.mark.parametrize(
    ("weight", "scale", "parts"),
    [
        (torch.zeros(130, 4, dtype=torch.int8), torch.ones(1, 1), ("scale", "[1, 1]", "[2, 1]")),
        (torch.zeros(130, 4, dtype=torch.int8), torch.tensor(1.0), ("scale", "[]", "[2, 1]")),
        (torch.zeros(130, 4, dtype=torch.int8), torch.ones(2, 1, dtype=torch.int32), ("scale", "int32", "float32")),
        (torch.zeros(130, 4), torch.ones(2, 1), ("weight", "float32", "float8_e4m3fn")),
        (torch.zeros(130, 4).to(torch.float8_e5m2), torch.ones(2, 1), ("weight", "float8_e5m2")),
        (torch.zeros(130, dtype=torch.int8), torch.ones(2), ("weight", "[130]")),
    ],
)
def test_block_fp8_refuses_other_shapes_and_dtypes(
    weight: torch.Tensor, scale: torch.Tensor, parts: tuple[str, ...]
) -> None:
    with pytest.raises(TensorError) as caught:
        decode_block_fp8(weight, scale)
    assert all(part in caught.value.message for part in parts)


def test_tensor_fp8_refuses_more_than_one_scale() -> None:
    with pytest.raises(TensorError, match=r"\[2\]"):
        decode_tensor_fp8(torch.zeros(4, 4, dtype=torch.int8), torch.ones(2))
    with pytest.raises(TensorError, match="int64"):
        decode_tensor_fp8(torch.zeros(4, 4, dtype=torch.int8), torch.tensor(1))
    with pytest.raises(TensorError, match=r"\[4\]"):
        decode_tensor_fp8(torch.zeros(4, dtype=torch.int8), torch.tensor(1.0))
