"""Merging at the level of rewards: one weighted mean of the rewards of a sample."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name


class WeightedSum(Balancer):
    r"""Merge the rewards of a sample into their weighted mean; advantages and gradients are those of a single reward.

    $$R_i = \frac{\sum_{k \in K_i} w_k R_{ik}}{\sum_{k \in K_i} w_k}, \qquad
      K_i = \{k : \text{reward } k \text{ applies to sample } i \text{ and is finite}\}$$

    Args:
        weights: Weight of each reward by name, > 0; 1 for those not named. Null: all 1.

    Source: the weighted-sum baseline of MARBLE, arXiv 2605.06507.
    """

    merged_name = "sum"

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.named_weights = weights

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        self.reward_weights = weights_by_name(self.named_weights, self.reward_names)

    def merge_rewards(
        self, rewards: Float[Tensor, "sample reward"], applies: Bool[Tensor, "sample reward"]
    ) -> Float[Tensor, "sample 1"]:
        """Weighted mean over the rewards that apply to the sample and are finite; NaN where there is none.

        Shape:
            rewards (N, K), applies (N, K) -> (N, 1).
        """
        present = applies & rewards.isfinite()
        weights = self.reward_weights.to(rewards) * present
        total = weights.sum(1, keepdim=True)
        mean = (weights * torch.where(present, rewards, 0)).sum(1, keepdim=True) / total
        return torch.where(total > 0, mean, torch.nan)
