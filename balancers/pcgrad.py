"""PCGrad: each gradient is projected so that it no longer conflicts with the others."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer


class PCGrad(Balancer):
    r"""Average the gradients after projecting each onto the normal planes of those it conflicts with, in random order.

    $$g_i^{PC} \leftarrow g_i^{PC} - \frac{\min(\langle g_i^{PC}, g_j \rangle, 0)}{\|g_j\|^2}\, g_j \quad (j \ne i),
      \qquad d = \tfrac1K \sum_i g_i^{PC}$$

    The projections are linear, so inner products suffice. The source sums the $g_i^{PC}$ and compares the sum with the
    gradient of the summed losses. All methods here are compared with the mean gradient, so this method takes the mean of
    the $g_i^{PC}$: without conflicts it is the mean gradient, at the same learning rate.

    Args:
        seed: Seed of the order of projection, which also depends on the optimizer step; the same on every rank.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.
    """

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        draws = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        return projection_weights(gram, [torch.randperm(len(gram), generator=draws).tolist() for _ in gram]) / len(gram)


def projection_weights(gram: Float[Tensor, "reward reward"], orders: list[list[int]]) -> Float[Tensor, " reward"]:
    """Weights of the sum of projected gradients.

    Args:
        gram: Inner products of the gradients.
        orders: Order in which gradient i is projected against the others, for each i.

    Shape:
        gram (K, K) -> (K,).

    >>> projection_weights(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), [[0, 1], [0, 1]])
    tensor([2.0000, 1.5000])
    """
    rows = torch.eye(len(gram), dtype=gram.dtype)  # row i: g_i^PC as a combination of the gradients
    for i, order in enumerate(orders):
        for j in order:
            if j != i and gram[j, j] > 0:
                rows[i, j] -= (rows[i] @ gram[j]).clamp(max=0) / gram[j, j]
    return rows.sum(0)
