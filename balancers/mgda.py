"""MGDA: the steepest direction on which no reward loses."""

from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.qp import min_norm_weights


class MGDA(Balancer):
    r"""Weigh the gradients by the min-norm point of their convex hull, as they are.

    $$d = \sum_k \alpha^*_k g_k, \quad \alpha^* = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k g_k \Big\|^2$$

    The shortest gradient takes most of the weight; `normalize`, `refresh_every` 10 and `ema_decay` 0.7 make this MARBLE.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012, theorem 2.
    """

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        return min_norm_weights(gram)
