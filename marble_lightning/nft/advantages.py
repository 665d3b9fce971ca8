"""Advantages: how much better an image is than the other images of its prompt, for each reward separately."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

AdvantageStd = Literal["round", "group"]
AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
"""Which part of an advantage is used; see `apply_advantage_mode`."""

EPSILON = 1e-4
"""Added to the standard deviation, as in the published implementation."""


def group_advantages(
    rewards: Float[Tensor, "sample reward"], groups: Int[Tensor, " sample"], std: AdvantageStd = "round"
) -> Float[Tensor, "sample reward"]:
    r"""Standardise each reward within the samples of one prompt.

    A_ik = (R_ik - mean over i's group) / (std_k + 1e-4), over valid samples only.

    Args:
        rewards: Rewards of each sample; NaN where a reward does not apply or is missing.
        groups: Index of each sample's prompt, from 0.
        std: Standard deviation over all valid samples of the round (`round`) or of the prompt (`group`).

    Returns:
        Advantages, NaN exactly where the rewards are NaN.

    Source: MARBLE, arXiv 2605.06507, eq. 3; its released code uses `std="round"`.
    """
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0.0).double()
    count = _per_group(valid.double(), groups)
    mean = (_per_group(values, groups) / count.clamp(min=1))[groups]
    centred = torch.where(valid, values - mean, 0.0)
    if std == "group":
        deviation = (_per_group(centred.square(), groups) / count.clamp(min=1)).sqrt()[groups]
    else:
        number = valid.sum(0).clamp(min=1)
        overall = torch.where(valid, values - values.sum(0) / number, 0.0)
        deviation = (overall.square().sum(0) / number).sqrt()
    advantages = (centred / (deviation + EPSILON)).to(rewards.dtype)
    return advantages.masked_fill(~valid, torch.nan)


def apply_advantage_mode(advantages: Float[Tensor, "sample reward"], mode: AdvantageMode) -> Float[Tensor, "sample reward"]:
    r"""The part of advantages that is used: A, max(A, 0), min(A, 0), [A > 0] or sign(A), in the order of the modes.

    Args:
        advantages: NaN where a reward does not apply; NaN stays NaN.
        mode: `all`, `positive_only`, `negative_only`, `one_only` or `binary`.

    Source: DiffusionNFT, arXiv 2509.16117, released code (`adv_mode`).
    """
    parts = {
        "all": advantages,
        "positive_only": advantages.clamp(min=0),
        "negative_only": advantages.clamp(max=0),
        "one_only": (advantages > 0).to(advantages),
        "binary": advantages.sign(),
    }
    return parts[mode].masked_fill(advantages.isnan(), torch.nan)


def _per_group(values: Tensor, groups: Tensor) -> Tensor:
    """Sums over groups, (group, reward)."""
    sums = values.new_zeros(int(groups.max()) + 1, values.shape[1])
    return sums.index_add(0, groups, values)
