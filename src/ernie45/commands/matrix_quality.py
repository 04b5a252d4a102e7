"""`ernie45 quality --layers`: how far quantised matrices of a checkpoint are from what is stored, one at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.backends.registry import find_architecture
from ernie45.checkpoint.open import open_checkpoint, read_config
from ernie45.checkpoint.read import TensorReader
from ernie45.checkpoint.resolve import resolve
from ernie45.commands.conversion_plan import check_config
from ernie45.commands.quality_report import LayersReport, MatrixQuality
from ernie45.errors import InvalidRequestError, UnsupportedError
from ernie45.kernels.bitsandbytes import BnbInt8Linear, Nf4Linear
from ernie45.kernels.linear import DenseLinear, Linear
from ernie45.kernels.packed_linear import build_packed_linear
from ernie45.presets import INT4_GROUP, NF4_BLOCK
from ernie45.quantization.packed import dequantize, empty_packed
from ernie45.quantization.quantize import quantize_into
from ernie45.spec import ModelSpec

SCHEMES = ("int8", "bnb-int8", "int4", "nf4", "Q4_0")
ALL = "all"

_NUM_INPUTS = 64  # rows of random inputs to a product
_ROW_MULTIPLE = 64  # what the fastest products want a matrix to have
_Q4_0_GROUP = 32
_Q4_0_BITS = 4.5
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    kind: str
    name: str
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Quantised:
    """A matrix [N, K] in one scheme: the weights that it stands for, float32, its product, and its bits in all."""

    weights: Tensor
    product: Callable[[Tensor], Tensor]
    num_bits: float


class _Sums:
    """Squared errors and squares of what they are relative to, added up over matrices."""

    def __init__(self) -> None:
        self.num_matrices = 0
        self.num_weights = 0
        self.num_bits = 0.0
        self.weights = torch.zeros(2, dtype=torch.float64)
        self.products = torch.zeros(2, dtype=torch.float64)

    def add(self, weight: Tensor, y: Tensor, quantised: _Quantised, x: Tensor) -> None:
        self.num_matrices += 1
        self.num_weights += weight.numel()
        self.num_bits += quantised.num_bits
        self.weights += _squares(quantised.weights - weight.float(), weight)
        self.products += _squares(quantised.product(x) - y.float(), y)


def matrix_quality(folder: str | os.PathLike[str], *, max_layers: int = 4, seed: int = 0) -> LayersReport:
    """Quantise single matrices of a checkpoint of any size, without loading it, and compare them with their bf16 form.

    Of `max_layers` layers, spread from the first to the last, it takes each projection of attention, of the dense or
    shared MLP and of the first routed expert, and besides the embedding and the head; of a large matrix the first rows,
    up to 16 MiB of the file. Products are with the same normally distributed inputs. Q4_0, the 4-bit format of GGUF
    files, is there to compare with (https://github.com/ggml-org/ggml, quantize_row_q4_0_ref).

    Args:
        folder: a folder, or a name as `ErnieModel.from_pretrained` takes it.

    Raises:
        InvalidRequestError: `max_layers` below 1.
        CheckpointError: no such folder, or a damaged one; one subclass for each case.
    """
    if max_layers < 1:
        raise InvalidRequestError(f"max_layers is {max_layers}, but must be at least 1", hint="4 are quick")
    path = resolve(folder, check=check_config)
    config = read_config(path)
    spec = find_architecture(config).parse_spec(config)
    checkpoint = open_checkpoint(path, config, spec)
    reader = TensorReader(checkpoint.index, checkpoint.layout)
    layers = _spread(spec.num_layers, max_layers)
    generator = torch.Generator().manual_seed(seed)
    sums: defaultdict[tuple[str, str], _Sums] = defaultdict(_Sums)
    notes: dict[str, None] = {}
    for matrix in _matrices(spec, layers, has_head="lm_head.weight" in reader):
        weight = _first_rows(reader, matrix)
        x = torch.randn((_NUM_INPUTS, weight.shape[1]), generator=generator).bfloat16()
        y = DenseLinear(weight)(x)
        for scheme in SCHEMES:
            if not _applies(scheme, weight):
                continue
            try:
                quantised = _quantise(scheme, weight)
            except UnsupportedError as error:
                notes[f"{scheme} was left out: {error.message}"] = None
                continue
            for kind in (matrix.kind, ALL):
                sums[kind, scheme].add(weight, y, quantised, x)
    return LayersReport(
        folder=path.name,
        layers=layers,
        rows=tuple(_row(kind, scheme, found) for (kind, scheme), found in _all_last(sums)),
        notes=tuple(notes),
    )


def _matrices(spec: ModelSpec, layers: tuple[int, ...], *, has_head: bool) -> Iterator[_Matrix]:
    """What is measured, by its -PT names."""
    hidden, query, key = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield _Matrix(kind="embedding", name="model.embed_tokens.weight", shape=(spec.vocab_size, hidden))
    for layer in layers:
        prefix = f"model.layers.{layer}."
        for name, width in (("q", query), ("k", key), ("v", key)):
            name = f"{prefix}self_attn.{name}_proj.weight"
            yield _Matrix(kind="attention q, k, v", name=name, shape=(width, hidden))
        yield _Matrix(kind="attention out", name=f"{prefix}self_attn.o_proj.weight", shape=(hidden, query))
        experts = spec.experts
        if experts is None or not experts.in_layer(layer):
            yield from _mlp("dense MLP", prefix + "mlp.", hidden, spec.intermediate_size)
            continue
        yield from _mlp("routed expert", prefix + "mlp.experts.0.", hidden, experts.intermediate_size)
        if experts.num_shared_experts:
            width = experts.num_shared_experts * experts.intermediate_size
            yield from _mlp("shared expert", prefix + "mlp.shared_experts.", hidden, width)
    if has_head:
        yield _Matrix(kind="head", name="lm_head.weight", shape=(spec.vocab_size, hidden))


def _mlp(kind: str, prefix: str, hidden: int, width: int) -> Iterator[_Matrix]:
    for name in ("gate", "up"):
        yield _Matrix(kind=f"{kind} gate, up", name=f"{prefix}{name}_proj.weight", shape=(width, hidden))
    yield _Matrix(kind=f"{kind} down", name=f"{prefix}down_proj.weight", shape=(hidden, width))


def _first_rows(reader: TensorReader, matrix: _Matrix) -> Tensor:
    """A matrix in bf16, or as many of its rows as are read at once: in every scheme they stand for themselves."""
    block = next(reader.read_blocks(matrix.name, matrix.shape))
    num_rows = len(block) if len(block) == matrix.shape[0] else len(block) // _ROW_MULTIPLE * _ROW_MULTIPLE
    return block[: num_rows or len(block)].bfloat16()


def _applies(scheme: str, weight: Tensor) -> bool:
    """Whether a matrix of this shape can be had in a scheme as the presets have it."""
    if scheme == "int4":
        return weight.shape[1] % INT4_GROUP == 0
    if scheme == "Q4_0":
        return weight.shape[1] % _Q4_0_GROUP == 0
    return scheme != "nf4" or weight.numel() % NF4_BLOCK == 0


def _quantise(scheme: str, weight: Tensor) -> _Quantised:
    if scheme == "nf4":
        # In float32 the codes lie in the order of the matrix, whatever the processor.
        plain = Nf4Linear(weight.float())
        shape = (weight.numel() // NF4_BLOCK, NF4_BLOCK)
        values = torch.ops.bitsandbytes.dequantize_4bit(
            plain.codes, plain.scales, NF4_BLOCK, "nf4", shape, torch.float32
        )
        return _with_product(Nf4Linear(weight), values.view(weight.shape))
    if scheme == "bnb-int8":
        linear = BnbInt8Linear(weight)
        return _with_product(linear, linear.codes.float() * linear.scales[:, None])
    if scheme == "Q4_0":
        weights = q4_0(weight.float())
        return _Quantised(
            weights=weights, product=DenseLinear(weights.bfloat16()), num_bits=_Q4_0_BITS * weight.numel()
        )
    num_rows, num_columns = weight.shape
    packed = empty_packed(scheme, num_rows, num_columns, INT4_GROUP, _CPU)
    quantize_into(packed, weight)
    return _with_product(build_packed_linear(packed, None, torch.bfloat16), dequantize(packed))


def _with_product(linear: Linear, weights: Tensor) -> _Quantised:
    return _Quantised(weights=weights, product=linear, num_bits=8 * (linear.code_bytes + linear.scale_bytes))


def q4_0(weight: Tensor) -> Tensor:
    """What float32 weights [N, K] become in Q4_0: 32 of them share a float16 scale d, the one of largest magnitude over
    -8, and are kept as round(w / d) + 8 from 0 to 15."""
    groups = weight.view(-1, _Q4_0_GROUP)
    scale = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True)) / -8
    codes = torch.where(scale == 0, 8.0, (groups / scale + 8.5).floor().clamp(0, 15))
    return ((codes - 8) * scale.half().float()).view_as(weight)


def _squares(error: Tensor, of: Tensor) -> Tensor:
    """Sums of squares [2]."""
    return torch.stack([torch.linalg.vector_norm(part.float(), dtype=torch.float64) ** 2 for part in (error, of)])


def _row(kind: str, scheme: str, found: _Sums) -> MatrixQuality:
    weight_error, product_error = (float((sums[0] / sums[1]).sqrt()) for sums in (found.weights, found.products))
    return MatrixQuality(
        kind=kind,
        scheme=scheme,
        num_matrices=found.num_matrices,
        bits=found.num_bits / found.num_weights,
        weight_error=weight_error,
        product_error=product_error,
    )


def _all_last(sums: dict[tuple[str, str], _Sums]) -> list[tuple[tuple[str, str], _Sums]]:
    return sorted(sums.items(), key=lambda item: item[0][0] == ALL)


def _spread(num_layers: int, max_layers: int) -> tuple[int, ...]:
    """At most so many numbers of layers, from the first to the last."""
    if max_layers == 1:
        return (0,)
    return tuple(sorted({round(i * (num_layers - 1) / (max_layers - 1)) for i in range(max_layers)}))
