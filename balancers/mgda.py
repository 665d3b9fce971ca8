"""MGDA: the steepest direction that opposes no reward."""

from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.qp import min_norm_weights


class MGDA(Balancer):
    r"""Weight the gradients by the min-norm point of their convex hull, without normalising them.

    $$d = \sum_k \alpha^*_k g_k, \quad \alpha^* = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k g_k \Big\|^2$$

    The shortest gradient gets most of the weight. With `normalize`, `refresh_every` 10 and `ema_decay` 0.7 this is MARBLE.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", 2012, theorem 2.
    """

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        return min_norm_weights(gram)
