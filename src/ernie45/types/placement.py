"""Which device holds which part of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Device names ("cpu", "cuda:0", …) of each part; of each layer one in `layers`, and in `experts` the one of its
    routed experts. The KV cache of a layer lies with its attention. `vision` has tower and resampler."""

    embedding: str
    layers: tuple[str, ...]
    experts: tuple[str, ...]
    head: str
    vision: str

    @staticmethod
    def on(device: str, num_layers: int) -> Placement:
        """Everything on one device."""
        return Placement(
            embedding=device,
            layers=(device,) * num_layers,
            experts=(device,) * num_layers,
            head=device,
            vision=device,
        )

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices in use, in the order of the work."""
        names = [self.embedding]
        for layer, experts in zip(self.layers, self.experts, strict=True):
            names += [layer, experts]
        return tuple(dict.fromkeys([*names, self.head, self.vision]))
