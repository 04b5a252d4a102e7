"""Keeping the experts evenly used while training, without a loss of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from tiny_optimizer import sum_over_processes
from torch import Tensor, nn
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeTopKRouter

BIAS_RATE: Final = 0.003


class RouterBalance:
    """Moves each router's correction bias towards even use of its experts (Wang et al., loss-free balancing, 2024).

    An expert that got fewer tokens than the mean in one optimiser step gains `BIAS_RATE`, one with more loses it.
    A model without routers has nothing to balance. `names` are those of the routers, in the order of the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = (Ernie4_5_MoeTopKRouter, Ernie4_5_VLMoeMoeTopKRouter)
        routers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
        self.names = list(routers)
        self._routers = list(routers.values())
        self._chosen: dict[int, Tensor] = {}  # the experts that each router chose last
        self._counts = [torch.zeros(router.num_experts) for router in self._routers]
        for place, router in enumerate(self._routers):
            router.register_forward_hook(lambda _m, _a, out, place=place: self._chosen.update({place: out[2]}))

    def count(self, num_tokens: Tensor, *, num_columns: int, is_vision: Tensor | None) -> None:
        """Count the choices of the last training pass; `num_tokens` [B] of each row's columns are no padding.

        `is_vision` [B, T] tells which tokens went to the vision experts, in a pass that had any.
        """
        real = (torch.arange(num_columns) < num_tokens[:, None]).flatten()
        for place, (name, counts) in enumerate(zip(self.names, self._counts, strict=True)):
            seen = real
            if ".vision_moe." in name:
                if is_vision is None:
                    continue
                seen = real[is_vision.flatten()]
            elif is_vision is not None:
                seen = real[~is_vision.flatten()]
            counts += torch.bincount(self._chosen[place][seen].flatten(), minlength=len(counts))

    def step(self, rate_factor: float) -> None:
        """Adjust every bias by the counts since the last step, of all processes."""
        if not self._routers:
            return
        sum_over_processes(self._counts)
        with torch.no_grad():
            for router, counts in zip(self._routers, self._counts, strict=True):
                bias = router.moe_statics.e_score_correction_bias
                bias += BIAS_RATE * rate_factor * (counts.mean() - counts).sign()
        self._shares = self.shares()
        self._counts = [torch.zeros_like(counts) for counts in self._counts]

    def shares(self) -> list[Tensor]:
        """Each expert's share [E] of the choices counted since the last step, for each router."""
        return [counts / counts.sum() for counts in self._counts]

    def report(self) -> Iterator[str]:
        """One line per router: each expert's share of the choices in the last step, and its bias."""
        for router, shares in zip(self._routers, self._shares if self._routers else [], strict=True):
            bias = router.moe_statics.e_score_correction_bias[0]
            yield "   experts " + " ".join(f"{s:.2f}({b:+.3f})" for s, b in zip(shares, bias, strict=True))
