"""Merging at the level of advantages: one weighted sum of the standardised per-reward advantages."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name


class AdvantageSum(Balancer):
    r"""Merge the per-reward advantages of a sample into one, normalised over the round.

    $$A_i = \frac{S_i - \operatorname{mean}(S)}{\operatorname{std}(S) + \epsilon}, \qquad
      S_i = \sum_{k \in K_i} w_k A_{ik}, \qquad K_i = \{k : \text{reward } k \text{ applies to sample } i\}$$

    Unlike in WeightedSum, the scale of a reward does not matter, but a sample still has a single advantage. With the
    objective's `advantage_std: group` the $A_{ik}$ are the source's group z-scores.

    Args:
        weights: Weight of each reward by name, > 0; 1 for those not named. Null: all 1.

    Source: GDPO, "Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization", 2026,
    decoupled normalisation and batch-wise normalisation.
    """

    merged_name = "sum"

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.named_weights = weights

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        self.reward_weights = weights_by_name(self.named_weights, self.reward_names)

    def merge_advantages(self, advantages: Float[Tensor, "sample reward"]) -> Float[Tensor, "sample 1"]:
        """Weighted sum over the rewards that apply, normalised over all samples; NaN where none applies.

        Shape:
            advantages (N, K) -> (N, 1).
        """
        weights = self.reward_weights.to(advantages)
        present = ~advantages.isnan()
        total = (weights * torch.where(present, advantages, 0)).sum(1, keepdim=True)
        scored = present.any(1)
        sums = total[scored]
        if len(sums) == 0:
            return torch.full_like(total, torch.nan)
        normalised = (total - sums.mean()) / (sums.std(correction=0) + EPSILON)
        return torch.where(scored[:, None], normalised, torch.nan)


EPSILON = 1e-4
"""Added to the standard deviation, as in the group advantages."""
