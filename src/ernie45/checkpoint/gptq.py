"""Reading the matrices of GPTQ checkpoints. What is not quantised in them is read like any other checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch

from ernie45.checkpoint.gptq_config import GptqConfig
from ernie45.checkpoint.headers import CheckpointIndex
from ernie45.checkpoint.layouts import Layout
from ernie45.checkpoint.read import TORCH_DTYPES, TensorReader, TensorSource
from ernie45.errors import TensorError, UnsupportedError
from ernie45.quantization.gptq import from_gptq, input_order, stack
from ernie45.quantization.packed import INT4_ZERO, PackedInt4


@final
class GptqSource:
    """A GPTQ checkpoint's tensors: 4-bit matrices by the -PT names of their modules (without ".weight"), the rest as
    `source` has it, which reads the files or only surveys them. `index` and `layout` are the checkpoint's.

    Raises UnsupportedError for Paddle's layouts, and for a quantised embedding or output head.
    """

    def __init__(self, source: TensorSource, index: CheckpointIndex, layout: Layout, config: GptqConfig) -> None:
        if layout.name != "pt":
            raise UnsupportedError(
                f"{index.folder} holds GPTQ weights in the layout {layout.name!r}",
                hint="quantise the -PT release of the model, or load it unquantised with quantization='int4'",
            )
        self._source = source
        self._index = index
        self._layout = layout
        self._config = config
        for name in ("model.embed_tokens", "lm_head"):
            if self.stored(name):
                raise UnsupportedError(
                    f"{index.folder} holds {name!r} as a GPTQ matrix, which is not read",
                    hint="quantise the model again, without its embedding and output head",
                )

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def read_into(self, out: torch.Tensor, parts: Mapping[str, int]) -> None:
        """Fill `out` with plain tensors, as `source` does."""
        self._source.read_into(out, parts)

    def read_packed(
        self, parts: Mapping[str, int], in_features: int, device: torch.device
    ) -> Sequence[PackedInt4] | None:
        """The matrices of these modules and output widths, in one if they can be; None where all of them are plain.

        Raises as `read` does, and UnsupportedError where some are plain.
        """
        plain = [name for name in parts if not self.stored(name)]
        if len(plain) == len(parts):
            return None
        if plain:
            raise UnsupportedError(
                f"of {list(parts)}, which work on the same inputs, {plain} are not quantised and the others are",
                hint="quantise the model again with all or none of them",
            )
        matrices = [self.read(name, out_features, in_features, device) for name, out_features in parts.items()]
        stacked = stack(matrices)
        return matrices if stacked is None else [stacked]

    def stored(self, name: str) -> bool:
        """Whether this module's matrix is stored quantised."""
        return f"{name}.qweight" in self._source

    def read(self, name: str, out_features: int, in_features: int, device: torch.device) -> PackedInt4:
        """The matrix [out, in] of a module, on `device`; on "meta" its shapes only, and the order of its inputs.

        Raises:
            TensorError: a tensor is missing or damaged, or not as this config and this model need it.
            UnsupportedError: the inputs do not divide into groups.
        """
        num_groups = self._num_groups(name, in_features)
        scales_info = self._index.tensors.get(self._layout.locate(f"{name}.scales").key)
        scales_dtype = torch.float16 if scales_info is None else TORCH_DTYPES[scales_info.dtype]
        qweight = self._tensor(f"{name}.qweight", (in_features // 8, out_features), torch.int32, device)
        qzeros = self._tensor(f"{name}.qzeros", (num_groups, -(-out_features // 8)), torch.int32, device)
        scales = self._tensor(f"{name}.scales", (num_groups, out_features), scales_dtype, device)
        g_idx = self._tensor(f"{name}.g_idx", (in_features,), torch.int32, device)
        if device.type == "meta":
            zeros = torch.empty((out_features, num_groups), dtype=torch.uint8, device=device)
            return PackedInt4(
                codes=torch.empty((out_features, in_features // 2), dtype=torch.uint8, device=device),
                scales=scales.T,
                zeros=None if self._config.is_symmetric else zeros,
                input_order=self._stored_order(name, in_features, num_groups) if self._config.reorders_inputs else None,
            )
        packed = from_gptq(
            qweight, qzeros, scales, g_idx, stores_zero_minus_one=self._config.stores_zero_minus_one, name=name
        )
        return self._as_planned(name, packed)

    def _stored_order(self, name: str, in_features: int, num_groups: int) -> torch.Tensor | None:
        """Read although nothing else is yet: which matrices can be stacked depends on it, and so do their bytes."""
        g_idx = torch.empty(in_features, dtype=torch.int32)
        TensorReader(self._index, self._layout).read_into(g_idx, {f"{name}.g_idx": in_features})
        return input_order(g_idx, num_groups, name)

    def _as_planned(self, name: str, packed: PackedInt4) -> PackedInt4:
        """What the config says was planned with, so it must be true."""
        if self._config.is_symmetric and packed.zeros is not None:
            raise TensorError(
                f"{name!r} has zeros other than 8, but by config.json it is symmetric",
                hint="if the weights are right, set 'sym' to false in config.json's quantization_config",
            )
        if not self._config.reorders_inputs and packed.input_order is not None:
            raise TensorError(
                f"{name!r} has its inputs in another order, which config.json does not say",
                hint="if the weights are right, set 'desc_act' to true in config.json's quantization_config",
            )
        if packed.zeros is None and not self._config.is_symmetric:
            return replace(packed, zeros=torch.full_like(packed.scales, INT4_ZERO, dtype=torch.uint8))
        return packed

    def _num_groups(self, name: str, in_features: int) -> int:
        group_size = self._config.group_size or in_features
        if in_features % group_size:
            raise UnsupportedError(
                f"{name!r} has {in_features} inputs, which do not divide into groups of {group_size}",
                hint="quantise the model again with a group size that divides all its widths, such as 32",
            )
        return in_features // group_size

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        self._source.read_into(out, {name: shape[0]})
        return out
