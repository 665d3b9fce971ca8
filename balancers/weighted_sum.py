"""Merging at the level of rewards: one weighted mean or sum of the rewards of a sample."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import weights_by_name
from balancers.spread import spread, squared_deviations

Reduction = Literal["mean", "sum"]


class WeightedSum(Balancer):
    r"""Merge the rewards of a sample into one; advantages and gradients are those of a single reward.

    The weighted mean over the rewards that apply to sample $i$ and are finite, $K_i$, or the plain sum:

    $$R_i = \frac{\sum_{k \in K_i} w_k R_{ik}}{\sum_{k \in K_i} w_k} \quad \text{(mean)}, \qquad
      R_i = \sum_k w_k m_{ik} R_{ik} \quad \text{(sum)}$$

    In the sum, a reward that does not apply ($m_{ik} = 0$) counts as 0, as in the authors' code. A sample with a reward that
    applies and is not finite has no sum.

    With `weights: std` $w_k = 1 / \sigma_k$, where $\sigma_k$ is the reward's standard deviation within prompts over all
    images of all rounds so far, this one included. A reward that has not told two images of a prompt apart yet has weight 0.
    With `reduction: sum` this is nearly AdvantageSum with the objective's `advantage_std: round`. That divides by the
    deviation over the round, which contains the differences between prompts, and forgets earlier rounds; here the scale
    varies less from round to round.

    Args:
        weights: Weight of each reward by name, > 0; 1 for those not named. Null: all 1. "std": the inverse of each reward's
            standard deviation within prompts.
        reduction: "mean", or "sum" as in the authors' code.

    Raises:
        ValueError: `reduction` is neither, or `weights` is another text than "std".

    Source: the weighted-sum baseline of MARBLE, arXiv 2605.06507.
    """

    merged_name = "sum"

    def __init__(self, weights: dict[str, float] | Literal["std"] | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(
                f"`reduction` must be 'mean' or 'sum'. Found {reduction!r}. Use 'sum' for that of the authors' code."
            )
        if isinstance(weights, str) and weights != "std":
            raise ValueError(f"`weights` must be numbers by reward name, 'std' or null. Found {weights!r}.")
        self.named_weights, self.reduction = weights, reduction

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        if not isinstance(self.named_weights, str):
            self.fixed_weights = weights_by_name(self.named_weights, self.reward_names)

    @property
    def reward_weights(self) -> Float[Tensor, " reward"]:
        """The weight of each reward, (K,) float64 on the CPU; with `weights: std` 0 before the first round."""
        if not isinstance(self.named_weights, str):
            return self.fixed_weights
        std = spread(self.memory.get("totals", torch.zeros(2, len(self.reward_names), dtype=torch.float64)))
        return torch.where(std > 0, 1 / std, 0.0)

    def begin_round(self, scores: Float[Tensor, "sample reward"], prompts: Int[Tensor, " sample"]) -> dict[str, float]:
        """With `weights: std`, add the round's spread. Returns the weights."""
        if self.named_weights != "std":
            return {}
        self.memory["totals"] = self.memory.get("totals", 0) + squared_deviations(scores, prompts)
        named = zip(self.reward_names, self.reward_weights.tolist(), strict=True)
        return {f"reward_weight/{name}": weight for name, weight in named}

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
            total = weights.sum(1, keepdim=True)
            merged = merged / torch.where(total > 0, total, 1)  # 0 where all its rewards have weight 0
            valid = present.any(1, keepdim=True)
        else:
            valid = applies.any(1, keepdim=True) & (finite | ~applies).all(1, keepdim=True)
        return torch.where(valid, merged, torch.nan)
