"""The text backend, dense and mixture of experts."""

from __future__ import annotations

import torch

from ernie45.backends.base import Batch, Step
from ernie45.backends.decoder import Decoder
from ernie45.backends.weights import WeightBuilder
from ernie45.checkpoint.read import TensorSource
from ernie45.spec import ModelSpec


class TextBackend:
    """A text model's weights on one device, in one dtype."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.spec: ModelSpec = decoder.spec
        self.dtype: torch.dtype = decoder.embedding.dtype
        self.device: torch.device = decoder.embedding.device

    def forward(self, batch: Batch) -> Step:
        return Step(logits=self._decoder(batch))


def build_text(
    spec: ModelSpec, source: TensorSource, *, dtype: torch.dtype, device: torch.device, context_tokens: int
) -> TextBackend:
    """Read every weight of a text checkpoint straight into its place (query, key and value into one matrix, gate and
    up into another).

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    return TextBackend(WeightBuilder(spec, source, dtype, device).decoder(context_tokens))
