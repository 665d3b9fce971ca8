"""Specialist samples: images that are informative for one reward only, and what a sum of rewards leaves of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from balancers import Balancer
from marble_lightning.nft.advantages import AdvantageStd, group_advantages

NONE = -1
"""In place of a reward, for samples that are not specialist."""


def merged_advantages(
    balancer: Balancer,
    names: Sequence[str],
    scores: Float[Tensor, "sample reward"],
    groups: Int[Tensor, " sample"],
    std: AdvantageStd = "round",
) -> Float[Tensor, " sample"]:
    """The one advantage of each sample under a balancer that merges rewards or advantages, as in a round of training.

    Args:
        balancer: Such as `WeightedSum` or `AdvantageSum`.
        names: Names of the rewards.
        scores: Score of each sample, NaN where a reward does not apply.
        groups: Index of each sample's prompt, from 0.
        std: As in `group_advantages`.

    Raises:
        ValueError: The balancer keeps several columns.
    """
    balancer.bind(names)
    balancer.begin_round(scores, groups)
    merged = balancer.merge_rewards(scores, ~scores.isnan())
    advantages = balancer.merge_advantages(group_advantages(merged, groups, std))
    if advantages.shape[1] != 1:
        raise ValueError(
            f"`balancer` must merge rewards or advantages into one. Found {type(balancer).__name__}, which keeps "
            f"{advantages.shape[1]}."
        )
    return advantages[:, 0]


def informative(advantages: Float[Tensor, "sample reward"], threshold: float) -> Bool[Tensor, "sample reward"]:
    """Whether a sample is informative for a reward: its advantage is at least `threshold` in size, and not missing."""
    return advantages.abs() >= threshold


def specialist_rewards(advantages: Float[Tensor, "sample reward"], threshold: float) -> Int[Tensor, " sample"]:
    """The one reward that each sample is informative for, -1 for samples that are informative for none or for several.

    >>> specialist_rewards(torch.tensor([[1.5, 0.1], [0.2, -2.0], [1.5, 1.5], [0.0, torch.nan]]), 1.0).tolist()
    [0, 1, -1, -1]
    """
    is_informative = informative(advantages, threshold)
    return torch.where(is_informative.sum(1) == 1, is_informative.int().argmax(1), NONE)


def heat_map_order(advantages: Float[Tensor, "sample reward"], threshold: float) -> Int[Tensor, " sample"]:
    """An order of samples in which specialist samples come first, by their reward and then by its advantage, falling.

    The others follow by the number of rewards that they are informative for, falling, and by their mean advantage.
    """
    reward = specialist_rewards(advantages, threshold)
    own = advantages.gather(1, reward.clamp(min=0)[:, None])[:, 0]
    count = informative(advantages, threshold).sum(1)
    special = reward != NONE
    first = torch.where(special, reward, advantages.shape[1] * 2 - count)
    second = torch.where(special, own, advantages.nanmean(1)).nan_to_num()
    by_second = second.argsort(descending=True, stable=True)
    return by_second[first[by_second].argsort(stable=True)]


def dilution(
    names: Sequence[str],
    advantages: Float[Tensor, "sample reward"],
    merged: Float[Tensor, " sample"],
    threshold: float,
) -> pandas.DataFrame:
    r"""What a merged advantage leaves of the specialist samples of each reward.

    `kept` is $\sum_i \operatorname{sign}(A_{ik})\,A_i \,/\, \sum_i |A_{ik}|$ over the specialist samples of reward $k$, with
    the merged advantage $A_i$: 1 if it equals the own one, 0 if nothing is left of it, negative if it has the other sign.
    `opposed` is the share of these samples whose merged advantage has the other sign.

    Args:
        names: Names of the rewards.
        advantages: Own advantages.
        merged: Merged advantages, of the same samples.
        threshold: As in `informative`.
    """
    reward, rows = specialist_rewards(advantages, threshold), {}
    for index, name in enumerate(names):
        chosen = reward == index
        own, after = advantages[chosen, index], merged[chosen]
        row: dict[str, float] = {"specialist samples": int(chosen.sum()), "share of all": float(chosen.double().mean())}
        if chosen.any():
            along = own.sign() * after
            row |= {"own advantage": float(own.abs().mean()), "merged, along own": float(along.mean())}
            row |= {"kept": float(along.sum() / own.abs().sum()), "opposed": float((along < 0).double().mean())}
        rows[name] = row
    return pandas.DataFrame.from_dict(rows, orient="index")
