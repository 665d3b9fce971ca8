"""Muon in float32. torch's computes in bfloat16, which takes twelve times as long on a CPU without that format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that makes a matrix nearly orthogonal."""


class Muon(torch.optim.Optimizer):
    """Matrices step in the direction of their orthogonalised momentum, other parameters by AdamW.

    Args:
        matrices: Weight matrices.
        others: All other parameters.
        lr: Learning rate of AdamW.
        matrix_lr: Learning rate of the matrices.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, matrices: Iterable[Parameter], others: Iterable[Parameter], lr: float, matrix_lr: float) -> None:
        super().__init__([{"params": list(matrices), "lr": matrix_lr}, {"params": list(others), "lr": lr}], {"lr": lr})
        self.adamw = torch.optim.AdamW(self.param_groups[1:], betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    @classmethod
    def of_layers(cls, model: nn.Module, layers: str, lr: float, matrix_lr: float = 0.02) -> Muon:
        """Return the optimizer of a model whose matrices are those in its modules named `layers`."""
        named = [(name, parameter, parameter.ndim == 2 and layers in name) for name, parameter in model.named_parameters()]
        matrices = [parameter for _, parameter, is_matrix in named if is_matrix]
        return cls(matrices, [parameter for _, parameter, is_matrix in named if not is_matrix], lr, matrix_lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.adamw.step()
        group, updates = self.param_groups[0], {}  # type: dict[str, Any], dict[tuple[int, ...], list[tuple[Parameter, Tensor]]]
        for parameter in group["params"]:
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 0.05)
            nesterov = parameter.grad.lerp(momentum, 0.95)
            updates.setdefault(tuple(parameter.shape), []).append((parameter, nesterov))
        for (rows, columns), pairs in updates.items():
            directions = orthogonalised(torch.stack([update for _, update in pairs]))
            size = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (parameter, _), direction in zip(pairs, directions, strict=True):
                parameter.mul_(1 - 0.01 * group["lr"]).sub_(direction, alpha=size)
        return loss


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (N, rows, columns) with their singular values moved close to 1, by five Newton-Schulz iterations."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    a, b, c = NEWTON_SCHULZ
    result = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = result @ result.mT
        result = a * result + (b * square + c * square @ square) @ result
    return result
