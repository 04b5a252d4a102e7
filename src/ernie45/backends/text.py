"""The text backend, dense and mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ernie45.backends.base import Batch, BuildOptions, Step
from ernie45.backends.decoder import Decoder
from ernie45.backends.weights import WeightBuilder
from ernie45.checkpoint.read import TensorSource
from ernie45.presets import WeightPart
from ernie45.spec import ModelSpec


class TextBackend:
    """A text model's weights, and the dtype of its arithmetic. `device` is where token ids go in."""

    def __init__(self, decoder: Decoder, options: BuildOptions, weight_bytes: Mapping[WeightPart, int]) -> None:
        self._decoder = decoder
        self.spec: ModelSpec = decoder.spec
        self.dtype: torch.dtype = options.dtype
        self.device: torch.device = torch.device(options.placement.embedding)
        self.weight_bytes: Mapping[WeightPart, int] = weight_bytes

    def forward(self, batch: Batch) -> Step:
        return Step(logits=self._decoder(batch))


def build_text(spec: ModelSpec, source: TensorSource, options: BuildOptions) -> TextBackend:
    """Read every weight of a text checkpoint straight into its place (query, key and value into one matrix, gate and
    up into another), quantised as the preset says.

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    builder = WeightBuilder(spec, source, options)
    return TextBackend(builder.decoder(), options, builder.placed)
