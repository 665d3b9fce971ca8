"""MARBLE: smoothed weights of a direction that opposes no reward, computed every few optimizer steps."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import group_rows, weights_by_name
from balancers.qp import check_floor, min_norm_weights, sensitivity

CANCELLED = 1e-3
"""Gradients of a group of two or more count as cancelling if their mean is shorter than this share of the longest mean."""


class MARBLE(Balancer):
    r"""Weight unit gradients by the min-norm point of their convex hull.

    $$\alpha^* = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k \hat g_k \Big\|^2, \quad \hat g_k = g_k / \|g_k\|,
      \qquad d = \Big(\sum_k \bar\alpha_k \hat g_k\Big) \cdot \tfrac1K \sum_k \|g_k\|$$

    Two rewards with opposite gradients determine the shortest vector by themselves and get nearly all the weight. If an
    important reward then gets too little weight, raise `floor`, give it a higher `preference`, put the two opposing rewards
    into one group, or remove one of them.

    With a `preference` the input of the program is $\hat g_k / p_k$: the guaranteed progress along $\hat g_k$ is
    proportional to $p_k$. With `groups` the input is the mean gradient of each group, scaled to unit length like a single
    gradient, and the group's rewards share its weight. Two opposing rewards in one group thus count as one reward, however
    short their mean is. The update then opposes no group's mean and no reward outside a group, while a member may oppose
    the rest of its group. The weights still sum to 1: the shorter a group's mean is, the more weight its rewards get, and
    the shorter the update is.

    Args:
        floor: Smallest weight of a reward or group in the program, before preference and smoothing, in
            [0, 1 / their number]; it does not apply to those left out by `dropout`. 0 is the paper.
        preference: Wanted progress on each reward relative to the others, by name, > 0; 1 for those not named.
        groups: Names of groups, each with the rewards whose gradients are averaged before the program.
        dropout: Probability in [0, 1) with which a reward is left out of a solution; at least one stays.
        dropout_ramp: Optimizer steps over which `dropout` rises from 0, >= 0.
        seed: Seed of the dropout, which also depends on the optimizer step; the same on every rank.
        refresh_every: Optimizer steps between two solutions, >= 1. The steps in between reuse the coefficients.
        ema_decay: How much of the old weights a solution keeps, in [0, 1). 0 keeps nothing.
        normalize: Whether the program receives unit gradients. Without it the smallest gradient gets most of the weight.

    Source: MARBLE, arXiv 2605.06507, eq. 5 (unit gradients), 6 (program), 7 (length), 12 (smoothing), proposition 1
    (amortisation).
    """

    def __init__(
        self,
        *,
        floor: float = 0.0,
        preference: dict[str, float] | None = None,
        groups: dict[str, list[str]] | None = None,
        dropout: float = 0.0,
        dropout_ramp: int = 0,
        seed: int = 0,
        refresh_every: int = 10,
        ema_decay: float = 0.7,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(refresh_every=refresh_every, ema_decay=ema_decay, normalize=normalize, **kwargs)
        if not 0 <= floor <= 1:
            raise ValueError(f"`floor` must be in [0, 1 / number of rewards or groups]. Found {floor}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Found {dropout}.")
        if dropout_ramp < 0:
            raise ValueError(f"`dropout_ramp` must be >= 0 optimizer steps. Found {dropout_ramp}.")
        self.floor, self.named_preference, self.groups = floor, preference, groups
        self.dropout, self.dropout_ramp, self.seed = dropout, dropout_ramp, seed

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        self.preference = weights_by_name(self.named_preference, self.reward_names, option="preference")
        self.rows = group_rows(self.groups, self.reward_names)
        check_floor(self.floor, len(self.rows))

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, " active"]:
        means = self.rows[:, self.active] * self._kept()
        means = means[means.any(1)]
        members = means.sum(1, keepdim=True)
        means = means / members
        lengths = ((means @ gram) * means).sum(1).clamp(min=0).sqrt()
        shortest = torch.where(members[:, 0] > 1, CANCELLED * lengths.max(), 0)  # a mean that cancels has no direction
        nonzero = lengths > shortest
        rows = means[nonzero] / self.preference[self.active]
        units = rows / lengths[nonzero, None] if self.options.normalize else rows
        merged = units @ gram @ units.T
        applied = units if self.groups else rows  # without groups the lengths are 1, and the division only adds rounding
        sensitivities = sensitivity(merged, self.floor) @ applied
        self.diagnostics["sensitivity"] = sensitivities.new_zeros(len(self.names)).masked_scatter(self.active, sensitivities)
        alpha = min_norm_weights(merged, self.floor) @ applied
        return alpha / alpha.sum()

    def _kept(self) -> Bool[Tensor, " active"]:
        """The active rewards that dropout keeps in this solution."""
        share = min(1.0, self.step / self.dropout_ramp) if self.dropout_ramp else 1.0
        draws = torch.rand(
            int(self.active.sum()), generator=torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        )
        kept = draws >= share * self.dropout
        return kept if kept.any() else draws == draws.max()
