"""Muon (Jordan et al. 2024): momentum whose singular values are made about equal before it moves a matrix.

The update of `torch.optim.Muon`, in float32, and for all matrices of a shape at once: torch rounds to bf16,
which a processor without bf16 units has to imitate, for half of the time of a training step (docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""a s + b s^3 + c s^5 takes a singular value in (0, 1] to about 1 when it is applied five times."""


@torch.no_grad()
def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """[n r c] with every matrix' singular values brought to between .7 and 1.2, by Newton-Schulz iteration."""
    a, b, c = POLYNOMIAL
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; a matrix taller than wide moves sqrt(height / width) times as far."""

    def __init__(
        self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        """Raises ValueError if one of `matrices` has not two axes."""
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for matrix in matrices:
            if matrix.ndim != 2:
                raise ValueError(f"Muon moves matrices, not parameters of shape {list(matrix.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            learning = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: p.shape)
            for _, same in groupby(learning, key=lambda p: p.shape):
                self._move(list(same), group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        moves = []
        for matrix in matrices:
            assert matrix.grad is not None
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
            moves.append(matrix.grad.lerp(mean, group["momentum"]))
        height, width = matrices[0].shape
        far = group["lr"] * max(1.0, height / width) ** 0.5
        for matrix, move in zip(matrices, orthogonal(torch.stack(moves)), strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-far)
