"""Constant weights on the gradients: the control for every adaptive method."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name


class FixedWeights(Balancer):
    r"""Merge the gradients with weights that never change, $d = \sum_k w_k g_k$ with $\sum_k w_k = 1$.

    Without `normalize` this costs no more than a single reward. With `normalize`, each $g_k$ is rescaled to the mean norm
    first on every `refresh_every`-th step.

    Args:
        weights: Weight of each reward by name, > 0; 1 for those not named, then divided by the sum. Null: all equal.
        refresh_every: Optimizer steps between two computations of the norms, >= 1. Used with `normalize` only.
        ema_decay: How much of the old weights a computation keeps, in [0, 1). It has no effect, since the weights are
            constant; `gram_decay` averages the squared norms over computations.
        normalize: Whether to rescale every gradient to the mean norm before weighting it.

    Source: the fixed-coefficient ablation of MARBLE, arXiv 2605.06507.
    """

    def __init__(
        self,
        *,
        weights: dict[str, float] | None = None,
        refresh_every: int = 1,
        ema_decay: float = 0.0,
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(refresh_every=refresh_every, ema_decay=ema_decay, normalize=normalize, **kwargs)
        self.named_weights = weights

    @property
    def needs_gradients(self) -> bool:
        return super().needs_gradients and self.options.normalize

    def initial_weights(self) -> Float[Tensor, " reward"]:
        weights = weights_by_name(self.named_weights, self.reward_names)
        return weights / weights.sum()

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        return self.initial_weights()[self.active]
