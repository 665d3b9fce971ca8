"""MARBLE: the direction on which no reward loses, solved for rarely and smoothed."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.qp import check_floor, min_norm_weights


class MARBLE(Balancer):
    r"""Weigh unit gradients by the min-norm point of their convex hull.

    $$\alpha^* = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k \hat g_k \Big\|^2, \quad \hat g_k = g_k / \|g_k\|,
      \qquad d = \Big(\sum_k \bar\alpha_k \hat g_k\Big) \cdot \tfrac1K \sum_k \|g_k\|$$

    Two rewards that oppose each other make the shortest vector by themselves and take nearly all the weight, whatever
    the others want. If a reward that matters starves this way, raise `floor` or drop one of the two.

    Source: MARBLE, arXiv 2605.06507, eq. 5 (unit gradients), 6 (program), 7 (length), 12 (smoothing), proposition 1
    (amortisation). `amortize: raw` is the paper to the letter.

    Args:
        floor: smallest weight of a reward before smoothing, in [0, 1 / number of rewards]. 0 is the paper.
        refresh_every: optimizer steps between two solutions, >= 1. The steps in between reuse the coefficients.
        ema_decay: how much of the old weights a solution keeps, in [0, 1). 0 forgets them.
        normalize: whether the program sees unit gradients. Without it the smallest gradient takes most of the weight.
    """

    def __init__(
        self,
        *,
        floor: float = 0.0,
        refresh_every: int = 10,
        ema_decay: float = 0.7,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(refresh_every=refresh_every, ema_decay=ema_decay, normalize=normalize, **kwargs)
        check_floor(floor, 1)
        self.floor = floor

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        check_floor(self.floor, len(self.reward_names))

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        return min_norm_weights(gram, self.floor)
