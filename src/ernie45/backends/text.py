"""The text backend, dense and mixture of experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ernie45.backends.base import Batch, BuildOptions, Step
from ernie45.backends.decoder import Decoder
from ernie45.backends.mtp import MtpHead, build_mtp_head
from ernie45.backends.native_stage import prefix_tokens
from ernie45.backends.weights import WeightBuilder
from ernie45.checkpoint.read import TensorSource
from ernie45.presets import WeightPart
from ernie45.spec import ModelSpec


class TextBackend:
    """A text model's weights, and the dtype of its arithmetic. `device` is where token ids go in. `mtp_head` is None
    where it was not asked for."""

    def __init__(
        self,
        decoder: Decoder,
        options: BuildOptions,
        weight_bytes: Mapping[WeightPart, int],
        mtp_head: MtpHead | None = None,
    ) -> None:
        self._decoder = decoder
        self.mtp_head = mtp_head
        self.spec: ModelSpec = decoder.spec
        self.dtype: torch.dtype = options.dtype
        self.device: torch.device = torch.device(options.placement.embedding)
        self.weight_bytes: Mapping[WeightPart, int] = weight_bytes
        self.prefix_tokens: int = prefix_tokens(decoder)
        self.expert_caches = decoder.expert_caches
        self.routing = decoder.routing

    def forward(self, batch: Batch) -> Step:
        return self._decoder(batch)


def build_text(spec: ModelSpec, source: TensorSource, options: BuildOptions) -> TextBackend:
    """Read every weight of a text checkpoint straight into its place (query, key and value into one matrix, gate and
    up into another), quantised as the preset says.

    Raises:
        TensorError: a tensor is missing or has another shape than the spec says.
    """
    builder = WeightBuilder(spec, source, options)
    decoder = builder.decoder()
    if not options.mtp:
        return TextBackend(decoder, options, builder.placed)
    weight_bytes = Counter(builder.placed)
    head = build_mtp_head(builder, decoder)
    weight_bytes["draft"] = builder.placed.total() - weight_bytes.total()
    return TextBackend(decoder, options, weight_bytes, head)
