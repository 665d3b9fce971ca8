"""MARBLE: weights of the direction on which no reward loses, solved for rarely and smoothed."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.base import Balancer
from balancers.per_reward_options import group_rows, weights_by_name
from balancers.qp import check_floor, min_norm_weights, sensitivity

CANCELLED = 1e-3
"""Share of the longest mean gradient below which a group's gradients count as cancelling each other."""


class MARBLE(Balancer):
    r"""Weigh unit gradients by the min-norm point of their convex hull.

    $$\alpha^* = \arg\min_{\alpha \in \Delta} \Big\| \sum_k \alpha_k \hat g_k \Big\|^2, \quad \hat g_k = g_k / \|g_k\|,
      \qquad d = \Big(\sum_k \bar\alpha_k \hat g_k\Big) \cdot \tfrac1K \sum_k \|g_k\|$$

    Two rewards that oppose each other make the shortest vector by themselves and take nearly all the weight, whatever
    the others want. If a reward that matters starves this way, raise `floor`, prefer it, put the two into one group, or
    drop one of them.

    With a `preference` the program sees $\hat g_k / p_k$: the progress it guarantees along $\hat g_k$ is in proportion to
    $p_k$. With `groups` it sees the mean of each group, at unit length like a single gradient, and its rewards share the
    weight: two that oppose each other are one voice, however short their mean. The update then goes against no group's mean
    and no reward outside a group, while a member may oppose the rest of its group. As the weights still sum up to 1, the
    shorter a mean is, the more of them its rewards take, and the shorter is the update.

    Source: MARBLE, arXiv 2605.06507, eq. 5 (unit gradients), 6 (program), 7 (length), 12 (smoothing), proposition 1
    (amortisation).

    Args:
        floor: smallest weight of a reward or group in the program, before preference and smoothing, in
            [0, 1 / their number]; one left out by `dropout` has none. 0 is the paper.
        preference: how much progress on each reward is wanted relative to the others, by name, > 0; 1 for those not named.
        groups: names of groups, each with the rewards whose gradients are averaged before the program.
        dropout: probability in [0, 1) with which a reward is left out of a solution; at least one stays.
        dropout_ramp: optimizer steps over which `dropout` rises from 0, >= 0.
        seed: seed of the dropout, which also depends on the optimizer step; the same on every rank.
        refresh_every: optimizer steps between two solutions, >= 1. The steps in between reuse the coefficients.
        ema_decay: how much of the old weights a solution keeps, in [0, 1). 0 forgets them.
        normalize: whether the program sees unit gradients. Without it the smallest gradient takes most of the weight.
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
        self.floor, self.by_name, self.groups = floor, preference, groups
        self.dropout, self.dropout_ramp, self.seed = dropout, dropout_ramp, seed

    def bind(self, reward_names: Sequence[str]) -> None:
        super().bind(reward_names)
        self.preference = weights_by_name(self.by_name, self.reward_names, option="preference")
        self.rows = group_rows(self.groups, self.reward_names)
        check_floor(self.floor, len(self.rows))

    def weights(self, gram: Float[Tensor, "active active"]) -> Float[Tensor, "active"]:
        means = self.rows[:, self.active] * self._kept()
        means = means[means.any(1)]
        means = means / means.sum(1, keepdim=True)
        lengths = ((means @ gram) * means).sum(1).clamp(min=0).sqrt()
        told = lengths > CANCELLED * lengths.max()  # a group whose gradients cancel has no direction to follow
        rows = means[told] / self.preference[self.active]
        seen = rows / lengths[told, None] if self.normalize else rows
        merged = seen @ gram @ seen.T
        applied = seen if self.groups else rows  # without groups lengths are 1, and dividing by them would only round
        found = torch.zeros_like(self.prior).masked_scatter(self.active, sensitivity(merged, self.floor) @ applied)
        self.diagnostics["sensitivity"] = found
        alpha = min_norm_weights(merged, self.floor) @ applied
        return alpha / alpha.sum()

    def _kept(self) -> Bool[Tensor, "active"]:
        """Which of the active rewards dropout leaves in this solution."""
        share = min(1.0, self.step / self.dropout_ramp) if self.dropout_ramp else 1.0
        draws = torch.rand(
            int(self.active.sum()), generator=torch.Generator().manual_seed(1_000_003 * self.seed + self.step)
        )
        kept = draws >= share * self.dropout
        return kept if kept.any() else draws == draws.max()
