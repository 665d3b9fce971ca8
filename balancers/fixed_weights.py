"""Constant weights on the gradients: the control that every adaptive rule has to beat."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name


class FixedWeights(Balancer):
    r"""Merge the gradients with weights that never change, $d = \sum_k w_k g_k$ with $\sum_k w_k = 1$.

    Without `normalize` this costs no more than a single reward. With it, $g_k$ is brought to the mean norm first, and
    the norms are taken every `refresh_every` steps. The steps in between only use them with `amortize: scaled`.

    Source: the fixed-coefficient ablation of MARBLE, arXiv 2605.06507.

    Args:
        weights: weight of each reward by name, > 0; 1 for those not named, then divided by the sum. Null: all equal.
        refresh_every: optimizer steps between two measurements of the norms, >= 1. Used with `normalize` only.
        ema_decay: how much of the old norm ratios a measurement keeps, in [0, 1). Used with `normalize` only.
        normalize: whether to bring every gradient to the mean norm before weighing it.
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
        self.by_name = weights

    @property
    def needs_gradients(self) -> bool:
        return super().needs_gradients and self.normalize

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        weights = weights_by_name(self.by_name, self.reward_names)
        self.prior = weights / weights.sum()

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        return self.prior[self.active]
