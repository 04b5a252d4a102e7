from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ernie45.errors import UnsupportedError
from ernie45.kernels import bitsandbytes
from ernie45.kernels.bitsandbytes import BnbInt8Linear, Nf4Linear, check_bitsandbytes
from ernie45.kernels.linear import packs
from ernie45.presets import NF4_BLOCK, code_bytes, scale_bytes

REPO_ROOT = Path(__file__).parents[2]

# Out, in: in tiles of the fused product; whole blocks of scales only; neither; an odd number of values; one row.
SHAPES = [(96, 192), (50, 64), (70, 130), (33, 35), (1, 100)]
KINDS = [Nf4Linear, BnbInt8Linear]
Kind = type[Nf4Linear] | type[BnbInt8Linear]

in_bfloat16 = pytest.mark.skipif(
    not packs(torch.bfloat16, torch.device("cpu")), reason="this CPU has no bf16 arithmetic in oneDNN"
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def round_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Each 64 values in row-major order to the nearest of the 16 of QLoRA (arXiv 2305.14314, appendix E)."""
    negative = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004])
    positive = torch.tensor([0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])
    table = torch.cat((negative, torch.zeros(1), positive)).double()
    values = weight.double().flatten()
    rounded = []
    for block in values.split(NF4_BLOCK):
        scale = block.abs().max()
        rounded.append(scale * table[(block[:, None] / scale - table).abs().argmin(dim=1)])
    return torch.cat(rounded).view(weight.shape)


def round_int8(values: torch.Tensor) -> torch.Tensor:
    scales = values.double().abs().amax(dim=1, keepdim=True) / 127
    return (values.double() / scales).round() * scales


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_multiplies_with_the_nearest_values_of_the_table(
    dtype: torch.dtype, shape: tuple[int, int], num_rows: int, with_bias: bool
) -> None:
    weight, x = random(*shape, dtype=dtype), random(num_rows, shape[1], dtype=dtype, seed=2)
    bias = random(shape[0], dtype=dtype, seed=3) if with_bias else None
    y = Nf4Linear(weight, bias)(x)
    expected = x.double() @ round_nf4(weight).T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_multiplies_rounded_rows(
    dtype: torch.dtype, shape: tuple[int, int], num_rows: int, with_bias: bool
) -> None:
    weight, x = random(*shape, dtype=dtype), random(num_rows, shape[1], dtype=dtype, seed=2)
    bias = random(shape[0], dtype=dtype, seed=3) if with_bias else None
    y = BnbInt8Linear(weight, bias)(x)
    expected = round_int8(x) @ round_int8(weight).T + (0 if bias is None else bias.double())
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert relative_error(y, expected) < (1e-4 if dtype == torch.float32 else 4e-3)


@in_bfloat16
@pytest.mark.parametrize("shape", [(384, 128), (64, 3072), (100, 3072), (70, 130)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(kind: Kind, shape: tuple[int, int]) -> None:
    linear = kind(random(*shape, dtype=torch.bfloat16))
    x = random(600, shape[1], dtype=torch.bfloat16, seed=2)
    x[7] *= 1000  # an outlier row
    together = linear(x)
    for first, num_rows in [(0, 1), (3, 1), (3, 2), (5, 3), (4, 4), (2, 7), (0, 16), (6, 33), (0, 512)]:
        assert torch.equal(linear(x[first : first + num_rows]), together[first : first + num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_takes_the_bytes_that_a_plan_counts(
    with_bias: bool, shape: tuple[int, int], device: str, dtype: torch.dtype
) -> None:
    weight = torch.ones(shape, dtype=dtype, device=device)
    bias = torch.ones(shape[0], dtype=dtype, device=device) if with_bias else None
    added = shape[0] * dtype.itemsize if with_bias else 0
    nf4, int8 = Nf4Linear(weight, bias), BnbInt8Linear(weight, bias)
    assert nf4.code_bytes == code_bytes("nf4", *shape, dtype.itemsize) + added
    assert nf4.scale_bytes == scale_bytes("nf4", *shape)
    assert int8.code_bytes == code_bytes("bnb-int8", *shape, dtype.itemsize) + added
    assert int8.scale_bytes == scale_bytes("bnb-int8", *shape)
    assert (nf4.out_features, nf4.in_features) == (int8.out_features, int8.in_features) == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_buffer_that_held_the_weight_can_be_reused(kind: Kind, dtype: torch.dtype) -> None:
    weight, x = random(64, 128, dtype=dtype), random(4, 128, dtype=dtype, seed=2)
    linear = kind(weight)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest tensor has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype not in (torch.uint8, torch.int8):
                self.num_values = max(self.num_values, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(320, 128), (321, 129)])
@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_go_through_in_blocks_of_rows(
    kind: Kind, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = random(*shape, dtype=dtype), random(8, shape[1], dtype=dtype, seed=2)
    at_once = kind(weight)
    expected = at_once(x)
    monkeypatch.setattr(bitsandbytes, "_QUANTIZED_VALUES", 128 * shape[1])
    monkeypatch.setattr(bitsandbytes, "_MULTIPLIED_VALUES", 128 * shape[1])
    in_blocks = kind(weight)
    assert torch.equal(in_blocks.codes, at_once.codes)
    assert torch.equal(in_blocks.scales, at_once.scales)
    with LargestTensor() as largest:
        torch.testing.assert_close(in_blocks(x), expected)
    assert largest.num_values <= 128 * shape[1]


def test_int8_takes_inputs_beyond_the_range_of_float16() -> None:
    weight, x = random(16, 64, dtype=torch.bfloat16), random(3, 64, dtype=torch.bfloat16, seed=2) * 1e6
    assert relative_error(BnbInt8Linear(weight)(x), x.double() @ weight.double().T) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_zeros(kind: Kind, dtype: torch.dtype) -> None:
    weight = random(64, 64, dtype=dtype)
    weight[5] = 0
    y = kind(weight)(torch.cat((torch.zeros(1, 64), random(1, 64, seed=2))).to(dtype))
    assert torch.equal(y[0], torch.zeros(64, dtype=dtype))
    assert y[1, 5] == 0
    assert (y[1].abs() > 0).sum() == 63


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_no_rows(kind: Kind) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert kind(random(64, 64, dtype=dtype))(torch.empty(0, 64, dtype=dtype)).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_what_the_cpu_gives(kind: Kind, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias, x = random(*shape, dtype=dtype), random(shape[0], dtype=dtype), random(40, shape[1], dtype=dtype)
    cpu, cuda = kind(weight, bias), kind(weight.cuda(), bias.cuda())
    for num_rows in (0, 1, 40):
        y = cuda(x[:num_rows].cuda()).cpu()
        torch.testing.assert_close(y, cpu(x[:num_rows]), atol=1e-3 if dtype == torch.float32 else 0.1, rtol=0.02)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not on 'mps'"):
        check_bitsandbytes(torch.device("mps"))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_error_says_how_to_get_it(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        kind(random(64, 64))


def test_the_package_is_imported_when_it_is_needed_and_then_quietly_and_offline(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('asked the Hub for native code')")
    script = """
import sys, torch
from ernie45.kernels.bitsandbytes import BnbInt8Linear, Nf4Linear
Nf4Linear(torch.empty(64, 64, device="meta")), BnbInt8Linear(torch.empty(64, 64, device="meta"))
assert "bitsandbytes" not in sys.modules
Nf4Linear(torch.ones(64, 64))
assert "bitsandbytes" in sys.modules and "kernels" not in sys.modules
"""
    run = subprocess.run(
        # bitsandbytes 0.49 calls what torch 2.13 warns about.
        [
            sys.executable,
            "-W",
            "ignore::FutureWarning",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_threads_may_import_the_package_at_once(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import time; time.sleep(0.5)")
    script = """
import sys
from concurrent.futures import ThreadPoolExecutor
from ernie45.kernels.bitsandbytes import _bitsandbytes
kernels = sys.modules["kernels"] = object()
with ThreadPoolExecutor(4) as pool:
    tasks = [pool.submit(_bitsandbytes) for _ in range(4)]
assert {task.result() for task in tasks} == {sys.modules["bitsandbytes"]}
assert sys.modules["kernels"] is kernels
"""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_the_version_to_install_is_the_one_that_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes._bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (required,) = re.findall(r'"bitsandbytes>=.+"', (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with pytest.raises(UnsupportedError) as caught:
        check_bitsandbytes(torch.device("cpu"))
    assert f"pip install {required}," in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_weights_beyond_the_range_of_float16(kind: Kind) -> None:
    weight, x = random(16, 64), random(3, 64, seed=2)
    weight[3] *= 1e6
    weight[4] *= 1e-9
    y, expected = kind(weight)(x), x.double() @ weight.double().T
    for row in (3, 4, 5):
        assert relative_error(y[:, row], expected[:, row]) < (0.15 if kind is Nf4Linear else 0.02)
