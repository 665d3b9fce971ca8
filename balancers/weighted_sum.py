"""Merging at the level of rewards: one weighted mean or sum of the rewards of a sample."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name

Reduction = Literal["mean", "sum"]


class WeightedSum(Balancer):
    r"""Merge the rewards of a sample into one; advantages and gradients are those of a single reward.

    The weighted mean over the rewards that apply to sample $i$ and are finite, $K_i$, or the plain sum:

    $$R_i = \frac{\sum_{k \in K_i} w_k R_{ik}}{\sum_{k \in K_i} w_k} \quad \text{(mean)}, \qquad
      R_i = \sum_k w_k m_{ik} R_{ik} \quad \text{(sum)}$$

    In the sum, a reward that does not apply ($m_{ik} = 0$) counts as 0, as in the authors' code. A sample with a reward that
    applies and is not finite has no sum.

    Args:
        weights: Weight of each reward by name, > 0; 1 for those not named. Null: all 1.
        reduction: "mean", or "sum" as in the authors' code.

    Raises:
        ValueError: `reduction` is neither.

    Source: the weighted-sum baseline of MARBLE, arXiv 2605.06507.
    """

    merged_name = "sum"

    def __init__(self, weights: dict[str, float] | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"`reduction` must be 'mean' or 'sum'. Found {reduction!r}. Use 'sum' for that of the authors' code."
            )
        self.named_weights, self.reduction = weights, reduction

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        self.reward_weights = weights_by_name(self.named_weights, self.reward_names)

    def merge_rewards(
        self, rewards: Float[Tensor, "sample reward"], applies: Bool[Tensor, "sample reward"]
    ) -> Float[Tensor, "sample 1"]:
        """Weighted mean or sum of each sample's rewards; NaN where there is none.

        Shape:
            rewards (N, K), applies (N, K) -> (N, 1).
        """
        finite = rewards.isfinite()
        present = applies & finite
        weights = self.reward_weights.to(rewards) * present
        merged = (weights * torch.where(present, rewards, 0)).sum(1, keepdim=True)
        if self.reduction == "mean":
            merged = merged / weights.sum(1, keepdim=True)
            valid = present.any(1, keepdim=True)
        else:
            valid = applies.any(1, keepdim=True) & (finite | ~applies).all(1, keepdim=True)
        return torch.where(valid, merged, torch.nan)
