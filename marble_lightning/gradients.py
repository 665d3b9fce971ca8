"""Per-reward gradients of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def gradients_by_passes(
    losses: Float[Tensor, " reward"], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, "reward parameter"]:
    """One autograd pass per reward: the reference, whose time grows with the number of rewards.

    Args:
        losses: Loss of each reward, from one graph, which is kept.
        parameters: Trainable parameters, in the order of the flat result.
    """
    return torch.stack(
        [flat(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)) for loss in losses]
    )


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " parameter"]:
    """Tensors as one vector, in float32."""
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def add_flat(gradient: Float[Tensor, " parameter"], parameters: Sequence[nn.Parameter]) -> None:
    """Add a flat gradient to what the parameters have gathered."""
    pieces = gradient.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        piece = piece.view_as(parameter).to(parameter.dtype)
        parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)
