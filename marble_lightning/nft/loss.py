"""The DiffusionNFT objective as pure functions, with two loss coefficients per sample and reward.

Each sample has two losses: L+, of the velocity moved from the old towards the trained one, and L-, of the velocity moved
away from it. A reward affects only the coefficients of the two losses. So the loss of any mixture of rewards is one
weighted sum of L+ and L-. This is exact even if an advantage is clamped or a reward does not apply to a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from marble_lightning.nft.advantages import AdvantageMode, AdvantageStd
from marble_lightning.utils.validation import require, require_one_of


@dataclass(frozen=True)
class Objective:
    """The NFT loss.

    Args:
        beta: β > 0, the distance of the positive and negative policies from the old one.
        max_advantage: A_max > 0, the advantage from which a sample counts as fully optimal.
        advantage_std: Advantages are divided by the standard deviation of the whole `round` or of their `group`.
        advantage_mode: The part of an advantage A that is used: `all`; max(A, 0) (`positive_only`); min(A, 0)
            (`negative_only`); 1 if A > 0, otherwise 0 (`one_only`); or the sign of A (`binary`).
        kl_weight: Weight >= 0 of the squared distance to the base's velocity; never balanced. With 0 it is not computed.
        kl_every: m >= 1: the KL term is computed on one of m micro-batches and multiplied by m, an unbiased estimate. m must
            divide the micro-batches of an optimizer step.

    Source: DiffusionNFT, arXiv 2509.16117.
    """

    beta: float = 0.1
    max_advantage: float = 5.0
    advantage_std: AdvantageStd = "round"
    advantage_mode: AdvantageMode = "all"
    kl_weight: float = 1e-4
    kl_every: int = 1

    def __post_init__(self) -> None:
        require_one_of(AdvantageStd, "`objective.advantage_std`", self.advantage_std)
        require_one_of(AdvantageMode, "`objective.advantage_mode`", self.advantage_mode)
        require(0 < self.beta < inf, "`objective.beta` must be > 0 and finite", self.beta)
        require(0 < self.max_advantage < inf, "`objective.max_advantage` must be > 0 and finite", self.max_advantage)
        require(0 <= self.kl_weight < inf, "`objective.kl_weight` must be >= 0 and finite", self.kl_weight)
        require(self.kl_every >= 1, "`objective.kl_every` must be >= 1", self.kl_every)

    def has_kl(self, step: int, index: int) -> bool:
        """Whether a micro-batch has a KL term: one of `kl_every`, each position in turn from one optimizer step to the next.

        Args:
            step: Optimizer steps taken; the same on all ranks, and in a run that resumes.
            index: Index of the micro-batch in its step or round.
        """
        return self.kl_weight > 0 and (step + index) % self.kl_every == 0


SCALE_FLOOR = 1e-5
"""Smallest adaptive scale w, as in the published implementation."""


class Coefficients(NamedTuple):
    """Loss coefficients c+ and c- of L+ and L- of each sample in the loss of each reward; both (sample, reward)."""

    plus: Float[Tensor, "sample reward"]
    minus: Float[Tensor, "sample reward"]

    @property
    def samples(self) -> Float[Tensor, " reward"]:
        """Number of samples that each reward applies to, up to a factor: c+ + c- is the same for all of them."""
        return (self.plus + self.minus).sum(0)

    def losses(self, plus: Float[Tensor, " sample"], minus: Float[Tensor, " sample"]) -> Float[Tensor, " reward"]:
        """The loss of each reward: sum_i c+_ik L+_i + c-_ik L-_i, without a matrix product, which autocast would round."""
        return (self.plus * plus[:, None] + self.minus * minus[:, None]).sum(0)

    def split(self, in_first: Bool[Tensor, " sample"]) -> Coefficients:
        """The same samples' coefficients in two parts: the columns of the first half's samples, then of the others."""
        halves = torch.stack([in_first, ~in_first], 1)[:, :, None]
        return Coefficients(*((halves * part[:, None]).flatten(1) for part in self))

    def concat(self, others: Coefficients) -> Coefficients:
        """The same samples' coefficients for these rewards, followed by those for other rewards."""
        return Coefficients(torch.cat([self.plus, others.plus], 1), torch.cat([self.minus, others.minus], 1))


def add_noise(
    clean: Float[Tensor, " batch *latent"], noise: Float[Tensor, " batch *latent"], t: Float[Tensor, " batch"]
) -> Float[Tensor, " batch *latent"]:
    """x_t = (1 - t) x_0 + t eps, the path of rectified flow; t in (0, 1]."""
    t = _column(t, clean)
    return (1 - t) * clean + t * noise


def nft_losses(
    velocity: Float[Tensor, " batch *latent"],
    old_velocity: Float[Tensor, " batch *latent"],
    noisy: Float[Tensor, " batch *latent"],
    clean: Float[Tensor, " batch *latent"],
    t: Float[Tensor, " batch"],
    beta: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    r"""L+ and L- of each sample.

    v± = (1 ∓ β) v_old ± β v_θ,  x̂± = x_t - t v±,  w± = stop_grad(mean |x̂± - x_0|),  L± = mean (x̂± - x_0)² / w±.

    Args:
        velocity: v_θ, of the trained adapter; has the graph.
        old_velocity: v_old, of the adapter that sampled the round.
        noisy: x_t.
        clean: x_0, the sampled latents.
        t: Flow time in (0, 1].
        beta: β > 0, the distance of the positive and negative policies from the old one.

    Source: DiffusionNFT, arXiv 2509.16117, the implicit positive and negative policies and the adaptive loss weighting.
    """

    def loss(mixed: Tensor) -> Tensor:
        error = (noisy - _column(t, noisy) * mixed - clean).double().flatten(1)
        scale = error.detach().abs().mean(1).clamp(min=SCALE_FLOOR)
        return (error.square().mean(1) / scale).to(velocity.dtype)

    return loss((1 - beta) * old_velocity + beta * velocity), loss((1 + beta) * old_velocity - beta * velocity)


def coefficients(
    advantages: Float[Tensor, "sample reward"],
    counts: Float[Tensor, " reward"],
    beta: float,
    max_advantage: float,
) -> Coefficients:
    r"""Loss coefficients c+ and c- of each sample for each reward.

    r = clamp(1/2 + A / (2 A_max), 0, 1);  c+ = (A_max / β) m r / n,  c- = (A_max / β) m (1 - r) / n. m is 1 if the reward
    applies to the sample, otherwise 0. n is the number of samples with m = 1 in the whole optimizer step, as the mean over
    ranks.

    Args:
        advantages: Advantage of each sample for each reward; NaN where the reward does not apply.
        counts: n, the number of samples of the whole optimizer step that each reward applies to; the mean over ranks,
            since gradients are averaged over ranks.
        beta: β of the loss.
        max_advantage: A_max, the advantage from which a sample counts as fully optimal.

    Source: DiffusionNFT, arXiv 2509.16117 (loss); MARBLE, arXiv 2605.06507, Prop. 1, here for coefficients instead of
    advantages, so that it also holds with clamps and missing rewards.
    """
    applies = ~advantages.isnan()
    optimality = (0.5 + torch.where(applies, advantages, 0.0) / (2 * max_advantage)).clamp(0, 1)
    share = applies.to(advantages) * (max_advantage / beta) / torch.where(counts > 0, counts, 1).to(advantages)
    return Coefficients(share * optimality, share * (1 - optimality))


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)
