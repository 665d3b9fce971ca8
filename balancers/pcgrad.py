"""PCGrad: each gradient gives up what it has against the others."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer


class PCGrad(Balancer):
    r"""Average the gradients after projecting each off those it conflicts with, one after the other in random order.

    $$g_i^{PC} \leftarrow g_i^{PC} - \frac{\min(\langle g_i^{PC}, g_j \rangle, 0)}{\|g_j\|^2}\, g_j \quad (j \ne i),
      \qquad d = \tfrac1K \sum_i g_i^{PC}$$

    The projections are linear, so the inner products are all they need. The source adds the $g_i^{PC}$ up, and sets that
    beside the gradient of the sum of the losses. Every method here stands beside the mean instead, so this is their mean:
    where nothing conflicts it is the plain mean, at the same learning rate.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, algorithm 1.

    Args:
        seed: seed of the order of projection, which also depends on the optimizer step; the same on every rank.
    """

    def __init__(self, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        draws = torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        return projected(gram, [torch.randperm(len(gram), generator=draws).tolist() for _ in gram]) / len(gram)


def projected(gram: Float[Tensor, "reward reward"], orders: list[list[int]]) -> Float[Tensor, "reward"]:
    """Weights of the sum of projected gradients; `orders[i]` is the order in which gradient i meets the others.

    Shape:
        gram (K, K) -> (K,).

    >>> projected(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), [[0, 1], [0, 1]])
    tensor([2.0000, 1.5000])
    """
    rows = torch.eye(len(gram), dtype=gram.dtype)  # row i: g_i^PC as a combination of the gradients
    for i, order in enumerate(orders):
        for j in order:
            if j != i and gram[j, j] > 0:
                rows[i, j] -= (rows[i] @ gram[j]).clamp(max=0) / gram[j, j]
    return rows.sum(0)
