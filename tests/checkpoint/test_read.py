from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ernie45.checkpoint import read
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.read import TensorReader
from ernie45.errors import CorruptFileError, TensorError


def reader_of(
    folder: Path, tensors: dict[str, torch.Tensor], advance: Callable[[int], None] | None = None
) -> TensorReader:
    save_file(tensors, folder / "model.safetensors")
    return TensorReader(read_headers(folder), PtLayout(), advance=advance)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 bytes, so that small tensors are read in many pieces."""
    monkeypatch.setattr(read, "BLOCK_BYTES", 16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(1,), (0, 4), (7,), (3, 5), (2, 3, 7), (2, 1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_reads_in_place_bit_for_bit(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    stored = (random(*shape) * 100).to(dtype)
    out = torch.empty(shape, dtype=dtype)
    reader_of(tmp_path, {"before": torch.ones(3), "w": stored}).read_into(out, {"w": len(out)})
    assert torch.equal(out.view(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8))


def test_bool_tensors_are_read(tmp_path: Path) -> None:
    out = torch.zeros(3, dtype=torch.bool)
    reader_of(tmp_path, {"w": torch.tensor([True, False, True])}).read_into(out, {"w": len(out)})
    assert out.tolist() == [True, False, True]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 7), (2, 1, 40)])
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_converts_floating_point_dtypes(
    tmp_path: Path, shape: tuple[int, ...], stored: torch.dtype, wanted: torch.dtype
) -> None:
    weight = random(*shape, dtype=stored)
    out = torch.empty(shape, dtype=wanted)
    reader_of(tmp_path, {"w": weight}).read_into(out, {"w": len(out)})
    assert torch.equal(out, weight.to(wanted))


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_u16_holds_the_bits_of_bfloat16(tmp_path: Path, wanted: torch.dtype) -> None:
    weight = random(5, 3, dtype=torch.bfloat16)
    out = torch.empty(5, 3, dtype=wanted)
    reader_of(tmp_path, {"w": weight.view(torch.uint16)}).read_into(out, {"w": len(out)})
    assert torch.equal(out, weight.to(wanted))


@pytest.mark.usefixtures("small_blocks")
def test_fills_rows_of_a_larger_matrix(tmp_path: Path) -> None:
    query, key = random(6, 8), random(2, 8)
    fused = torch.full((10, 8), -1.0)
    reader = reader_of(tmp_path, {"q": query, "k": key})
    reader.read_into(fused[:8], {"q": 6, "k": 2})
    assert torch.equal(fused, torch.cat([query, key, torch.full((2, 8), -1.0)]))


@pytest.mark.usefixtures("small_blocks")
def test_fills_a_transposed_view(tmp_path: Path) -> None:
    weight = random(9, 5)
    out = torch.zeros(5, 9)
    reader_of(tmp_path, {"w": weight}).read_into(out.T, {"w": 9})
    assert torch.equal(out, weight.T)


def test_fills_a_parameter(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    reader_of(tmp_path, {"w": torch.ones(3)}).read_into(parameter, {"w": len(parameter)})
    assert parameter.tolist() == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_reads_to_a_gpu(tmp_path: Path) -> None:
    weight = random(300, 50, dtype=torch.bfloat16)
    out = torch.empty(300, 50, dtype=torch.float16, device="cuda")
    reader_of(tmp_path, {"w": weight}).read_into(out, {"w": len(out)})
    assert torch.equal(out.cpu(), weight.half())


def test_it_knows_what_is_there(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"a": torch.ones(2)})
    assert "a" in reader
    assert "d" not in reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("small_blocks")
def test_a_value_that_is_not_finite_is_named_by_its_tensor(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    weight = random(5, 6, dtype=dtype)
    weight[3, 2] = bad
    reader = reader_of(tmp_path, {"norm.weight": torch.ones(2), "w": weight})
    for wanted in (torch.float32, torch.bfloat16):
        with pytest.raises(TensorError, match=r"tensor 'w' in .* holds 1 values that are not finite"):
            reader.read_into(torch.empty(5, 6, dtype=wanted), {"w": 5})


def test_large_finite_values_pass(tmp_path: Path) -> None:
    weight = torch.full((64,), 3e38)
    out = torch.empty(64)
    reader_of(tmp_path, {"w": weight}).read_into(out, {"w": 64})
    assert torch.equal(out, weight)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tells_the_bytes_read_in_small_steps(tmp_path: Path, dtype: torch.dtype) -> None:
    steps: list[int] = []
    reader_of(tmp_path, {"w": random(10, 4)}, steps.append).read_into(torch.empty(10, 4, dtype=dtype), {"w": 10})
    assert sum(steps) == 160
    assert max(steps) <= 16


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"w": torch.ones(2, 3)})
    with pytest.raises(TensorError, match=r"'w' is stored with shape \[2, 3\], but the model needs \[3, 2\]"):
        reader.read_into(torch.empty(3, 2), {"w": 3})


def test_a_missing_tensor_is_refused_with_the_closest_name(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"model.norm.weight": torch.ones(2)})
    with pytest.raises(TensorError, match=r"no tensor 'norm\.weight'") as caught:
        reader.read_into(torch.empty(2), {"norm.weight": 2})
    assert "model.norm.weight" in caught.value.hint


@pytest.mark.parametrize(("stored", "wanted"), [(torch.int8, torch.float32), (torch.float32, torch.int8)])
def test_integers_do_not_pass_for_floating_point(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    reader = reader_of(tmp_path, {"w": torch.ones(2, dtype=stored)})
    with pytest.raises(TensorError, match="'w' is stored as"):
        reader.read_into(torch.empty(2, dtype=wanted), {"w": 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_shrank_after_its_header_was_read_is_corrupt(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = reader_of(tmp_path, {"w": torch.ones(64)})
    path = tmp_path / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 10)
    with pytest.raises(CorruptFileError, match=f"expected {whole} bytes or more, it has {whole - 10}"):
        reader.read_into(torch.empty(64, dtype=dtype), {"w": 64})


@pytest.mark.usefixtures("no_network")
def test_every_paddle_fixture_is_read_as_safetensors_reads_it(shared_fixtures: Path) -> None:
    from safetensors.torch import load_file

    folders = sorted(path.parent for path in shared_fixtures.glob("paddle/**/config.json"))
    assert folders
    for folder in folders:
        index = read_headers(folder)
        reader = TensorReader(index, PtLayout())
        for file in sorted({info.file for info in index.tensors.values()}):
            for name, expected in load_file(file).items():
                expected = expected.view(torch.bfloat16) if expected.dtype == torch.uint16 else expected
                out = torch.empty_like(expected)
                reader.read_into(out, {name: len(out)})
                assert torch.equal(out, expected)


def test_memory_grows_by_less_than_64_mib_beside_the_tensor(tmp_path: Path) -> None:
    num_elements = 32 << 20
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_elements], "data_offsets": [0, 4 * num_elements]}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 4 * num_elements)  # sparse: reads as zeros, takes no disk
    script = f"""
import resource, torch
from pathlib import Path
from ernie45.checkpoint.headers import read_headers
from ernie45.checkpoint.layouts import PtLayout
from ernie45.checkpoint.read import TensorReader
torch.set_num_threads(1)
outs = [torch.full(({num_elements},), 2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for out in outs:
    TensorReader(read_headers(Path({str(tmp_path)!r})), PtLayout()).read_into(out, {{"w": len(out)}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert not any(out.any() for out in outs)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    grown_kib = int(done.stdout)
    assert grown_kib < 64 << 10
