"""How far 4-bit matrices are from the weights they stand for: group sizes, kinds of scale and ways of rounding.

python -m benchmarks.int4_error [FILE_OR_FOLDER ...] [--rows 256] [--matrices 12]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from ernie45.quantization.packed import dequantize, empty_packed
from ernie45.quantization.quantize import quantize_into

COLUMNS = 2560
GROUP_SIZE = 32
STRETCHES = (0.95, 1.0, 1.1)
NUM_TIMED = 5
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """A way to round groups of a row. Symmetric: code · scale, codes -8 to 7, the value of largest magnitude -8.
    Otherwise: code · scale + offset, from the smallest value to the largest. Scales and offsets are float16, or int8
    times a float32 of the row. `search` takes the best of a few scales, each refitted to its codes by least squares."""

    group_size: int
    symmetric: bool
    scale: Literal["int8", "float16"]
    search: bool

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.group_size}, {kind}, {self.scale}, {'search' if self.search else 'plain'}"

    @property
    def bits(self) -> float:
        """Per weight, without what a row takes."""
        per_value = 8 if self.scale == "int8" else 16
        return 4 + (1 if self.symmetric else 2) * per_value / self.group_size

    def round(self, weight: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, self.group_size))
        if self.symmetric:
            largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
            scale, offset, start = largest / -8, torch.zeros_like(largest), 0.0
        else:
            low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
            scale, offset, start = (high - low) / 15, (high + low) / 2, 0.5
        offset = offset + start * scale  # of code 0, where codes go from -8 to 7
        if self.search:
            scale, offset = self._best(groups, scale, offset)
        scale, offset = self._stored(scale), self._stored(offset)
        return (_codes(groups, scale, offset) * scale + offset).flatten(1)

    def _best(self, groups: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        least = torch.full_like(scale, torch.inf)
        best_scale, best_offset = scale, offset
        for stretch in STRETCHES:
            codes = _codes(groups, scale * stretch, offset)
            code_mean, mean = codes.mean(dim=2, keepdim=True), groups.mean(dim=2, keepdim=True)
            if self.symmetric:
                code_mean, mean = torch.zeros_like(mean), torch.zeros_like(mean)
            spread = ((codes - code_mean) ** 2).sum(dim=2, keepdim=True).clamp(min=1e-6)
            fit = ((codes - code_mean) * (groups - mean)).sum(dim=2, keepdim=True) / spread
            fit_offset = mean - fit * code_mean
            error = ((codes * fit + fit_offset - groups) ** 2).sum(dim=2, keepdim=True)
            best_scale = torch.where(error < least, fit, best_scale)
            best_offset = torch.where(error < least, fit_offset, best_offset)
            least = torch.minimum(error, least)
        return best_scale, best_offset

    def _stored(self, values: Tensor) -> Tensor:
        """Rounded as they are stored."""
        if self.scale == "float16":
            return values.half().float()
        step = (values.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
        return (values / step).round() * step


def _codes(groups: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, (groups - offset) / scale).round().clamp(-8, 7)


SCHEMES = [
    Scheme(group_size=group_size, symmetric=symmetric, scale=scale, search=search)
    for symmetric in (True, False)
    for group_size in (32, 64, 128)
    for scale in ("int8", "float16")
    for search in (False, True)
]


def q4_0(weight: Tensor) -> Tensor:
    """llama.cpp's Q4_0: 18 bytes for 32 weights."""
    groups = weight.view(-1, GROUP_SIZE)
    scale = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True)) / -8
    codes = torch.where(scale == 0, 8.0, (groups / scale + 8.5).trunc().clamp(max=15))
    return ((codes - 8) * scale.half().float()).view_as(weight)


def ours(weight: Tensor) -> Tensor:
    """As ernie45's int4."""
    packed = empty_packed("int4", weight.shape[0], weight.shape[1], GROUP_SIZE, CPU)
    quantize_into(packed, weight)
    return dequantize(packed)


def drawn(num_rows: int) -> dict[str, list[Tensor]]:
    """Matrices of known distributions, by name; `outliers` has in each row a value of 20 standard deviations."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(num_rows, COLUMNS, generator=generator)
    signs = torch.rand(num_rows, COLUMNS, generator=generator) - 0.5
    chi = torch.randn(5, num_rows, COLUMNS, generator=generator).square().mean(dim=0).sqrt()
    outliers = normal.clone()
    outliers[torch.arange(num_rows), torch.randint(0, COLUMNS, (num_rows,), generator=generator)] = 20
    laplace = -signs.sign() * torch.log1p(-2 * signs.abs().clamp(max=0.4999999))
    return {"normal": [normal], "Laplace": [laplace], "Student t5": [normal / chi], "outliers": [outliers]}


def stored(path: Path, num_rows: int, num_matrices: int) -> list[Tensor]:
    """The first rows of some matrices, spread over the files, whose rows divide into every group size."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = [(file, name) for file in files for name in _projections(file)]
    if not found:
        raise SystemExit(f"{path}: no safetensors file with projections whose rows are a multiple of 128")
    chosen = found[:: max(1, len(found) // num_matrices)]
    return [_rows(file, name, num_rows) for file, name in chosen]


def _projections(file: Path) -> Iterator[str]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            shape = tensors.get_slice(name).get_shape()
            if name.endswith("proj.weight") and len(shape) == 2 and shape[1] % 128 == 0:
                yield name


def _rows(file: Path, name: str, num_rows: int) -> Tensor:
    with safe_open(file, "pt") as tensors:
        rows: Tensor = tensors.get_slice(name)[:num_rows]
    return rows.float()


def relative_error(weights: list[Tensor], approximations: list[Tensor]) -> float:
    """Root of the squared error over the squared weights, of all matrices together."""
    lost = sum(float((new - old).square().sum()) for new, old in zip(approximations, weights, strict=True))
    return float((lost / sum(float(weight.square().sum()) for weight in weights)) ** 0.5)


def nanoseconds(scheme: str) -> float:
    """Processor time of one thread for a weight of a bf16 matrix, the least of several."""
    weight = torch.randn(1536, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = empty_packed(scheme, weight.shape[0], weight.shape[1], GROUP_SIZE, CPU)
    seconds = []
    for _ in range(NUM_TIMED):
        started = time.process_time()
        quantize_into(packed, weight)
        seconds.append(time.process_time() - started)
    return 1e9 * min(seconds) / weight.numel()


def print_table(sources: Mapping[str, list[Tensor]]) -> None:
    methods: list[tuple[str, float, Callable[[Tensor], Tensor]]] = [
        ("ernie45", 4.25, ours),
        ("Q4_0", 4.5, q4_0),
        *((str(scheme), scheme.bits, scheme.round) for scheme in SCHEMES),
    ]
    print("| group, kind, scale, rounding | bits | " + " | ".join(sources) + " |")
    print("| --- " * (len(sources) + 2) + "|")
    for name, bits, method in methods:
        errors = [relative_error(weights, [method(weight) for weight in weights]) for weights in sources.values()]
        print(f"| {name} | {bits:.3f} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="safetensors files, or folders of them")
    parser.add_argument("--rows", type=int, default=256, help="rows of a matrix")
    parser.add_argument("--matrices", type=int, default=12, help="matrices of a file or folder, about")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = drawn(arguments.rows)
    sources |= {path.name: stored(path, arguments.rows, arguments.matrices) for path in arguments.paths}
    print_table(sources)
    print(f"\nint4 {nanoseconds('int4'):.1f} ns a weight, int8 {nanoseconds('int8'):.1f}, on one thread")


if __name__ == "__main__":
    main()
