"""Muon on the weight matrices and AdamW on the rest, shared by two or more gloo processes."""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

MUON_RATE: Final = 0.01
ADAMW_RATE: Final = 2e-3
MOMENTUM: Final = 0.95


def orthogonalize(matrix: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrix, or stack of them [N, out, in].

    Five quintic Newton-Schulz steps (Jordan et al., Muon, 2024).
    """
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    wide = matrix.bfloat16() if is_wide else matrix.bfloat16().mT
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    result: Tensor = wide if is_wide else wide.mT
    return result.float()


class TinyOptimizer:
    """Sums gradients over the processes and steps every parameter; each process orthogonalises its share."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Embeddings and routers hold one row per token or expert, and stay with AdamW.
        self.matrices = [
            p for name, p in named if p.ndim >= 2 and "embed" not in name and not name.endswith(".gate.weight")
        ]
        matrix_ids = {id(p) for p in self.matrices}
        self.others = [p for _, p in named if id(p) not in matrix_ids]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW(self.others, lr=ADAMW_RATE, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, rate_factor: float) -> None:
        """One step with the gradients of all processes at `rate_factor` times the full learning rates."""
        parameters = [*self.matrices, *self.others]
        sum_over_processes([p.grad for p in parameters if p.grad is not None])
        updates = [torch.zeros_like(p) for p in self.matrices]
        for place, (p, momentum, update) in enumerate(zip(self.matrices, self.momenta, updates, strict=True)):
            if p.grad is None:
                continue
            momentum.lerp_(p.grad, 1 - MOMENTUM)
            if place % dist.get_world_size() == dist.get_rank():
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                update.copy_(orthogonalize(p.grad.lerp(momentum, MOMENTUM)) * scale)
        sum_over_processes(updates)
        with torch.no_grad():
            for p, update in zip(self.matrices, updates, strict=True):
                p.add_(update, alpha=-MUON_RATE * rate_factor)
        for group in self.adamw.param_groups:
            group["lr"] = ADAMW_RATE * rate_factor
        self.adamw.step()
        for p in parameters:
            p.grad = None

    def state(self) -> dict[str, object]:
        """What a continued run needs."""
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load(self, state: dict[str, object]) -> None:
        """Take back what `state` gave."""
        momenta = state["momenta"]
        adamw = state["adamw"]
        assert isinstance(momenta, list)
        assert isinstance(adamw, dict)
        self.momenta = momenta
        self.adamw.load_state_dict(adamw)


def sum_over_processes(tensors: list[Tensor]) -> None:
    """All-reduce tensors in place as one flat buffer."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
