"""Probes: alignment of the update that is about to be applied, for any balancer."""

from __future__ import annotations

from functools import reduce
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers import Balancer, WeightedSum
from balancers.gramian import agreement, conflict_by_chance, cosines, gram_matrix, statistics
from balancers.merging import active_rows
from balancers.signal_gram import Products, products_of
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Coefficients
from marble_lightning.nft.reward_gradients import flat
from marble_lightning.nft.rollout import Rollout
from marble_lightning.utils.seeds import derived_seed, generator


class Probe(NamedTuple):
    """What a probe found. It is empty for an update that is not finite, which a loss scaler skips.

    `by_place` has the figures by place (`own`, `split`, `fresh`) and name. `cosines` are those of the update with each
    reward, (reward,), by place (`own`, `split`). `products` are the rewards', on the images that the update came from. Both
    are NaN for rewards without a gradient.
    """

    by_place: dict[str, dict[str, float]]
    cosines: dict[str, Float[Tensor, " reward"]]
    products: Products | None


def probe(module: DiffusionNFT, step: int, fresh: bool = True) -> Probe:
    """Alignment of the update about to be applied: on its `own` images, on halves of these, and on a `fresh` round.

    All places have the baselines of `GradientAlignment`. Rewards without a gradient are left out.

    Args:
        module: A module in training, with all gradients of the step accumulated.
        step: The optimizer step, which also seeds the fresh round.
        fresh: Whether to sample a fresh round, with the same policy.
    """
    found, update, k = Probe({}, {}, None), update_of(module), len(module.rewards)
    if not update.isfinite().all():
        return found
    part = step % (module.plan.total // module.plan.per_step)
    parts, samples = gradients_of_halves(module, module.rollout, module.scores, module.seed, part)
    products, rows = products_of(parts, samples), parts.sum(0)
    active = active_rows(products.own.diagonal()[:k].sqrt())
    if not active.any():
        return found
    seed = derived_seed(module.seed, "probe", step)
    gradients = rows[:k][active.to(rows.device)]
    directions = {"update": update, "weighted_sum": rows[k], **baselines(gradients, generator(seed, "random"))}
    found.by_place["own"] = agreement_and_chance(directions, gradients)
    by_place, cosines_by_place = split_agreement(products, active, column_weights(module))
    found.by_place.update(by_place)
    found.cosines.update(cosines_by_place)
    if fresh:
        sampled = module.sample_round(seed)
        rows = gradients_of_halves(module, sampled.rollout, sampled.scores, seed, 0)[0].sum(0)[:k]
        rows = rows[active_rows(gram_matrix(rows).diagonal().sqrt()).to(rows.device)]
        if len(rows):
            found.by_place["fresh"] = agreement_and_chance(directions, rows)
    return found._replace(products=Products(products.own[:k, :k], products.cross[:k, :k]).where(active))


def agreement_and_chance(
    directions: dict[str, Float[Tensor, " parameter"]], gradients: Float[Tensor, "reward parameter"]
) -> dict[str, float]:
    """Gradient harmony of directions with non-zero gradients, and the conflict rate of a random direction."""
    return agreement(directions, gradients) | {"chance": conflict_by_chance(gram_matrix(gradients))}


def split_agreement(
    products: Products, active: Bool[Tensor, " reward"], weights: Float[Tensor, " column"]
) -> tuple[dict[str, dict[str, float]], dict[str, Float[Tensor, " reward"]]]:
    """Gradient harmony of the update and of baselines by products of halves, and the update's cosines with each reward.

    Args:
        products: Of the columns of `gradients_of_halves`.
        active: Which rewards have a gradient.
        weights: The update's weights of the columns.

    Returns:
        Figures for the place `split`, and cosines by place (`own`, `split`). No figures if a reward is absent from a half.
    """
    k, n = len(active), int(active.sum())
    kept = torch.cat([active, torch.ones(len(weights) - k, dtype=torch.bool)])
    own, split = (matrix[kept][:, kept] for matrix in (products.own, products.split))
    first = torch.arange(len(own)) < n
    directions = {
        "update": weights[kept],
        "weighted_sum": (torch.arange(len(own)) == n).double(),
        "mean": first.double(),
        "unit_mean": torch.where(first, 1 / own.diagonal().sqrt(), 0),
    }
    places = {"own": None} | ({"split": split} if split.isfinite().all() else {})
    nothing = torch.full((k,), torch.nan, dtype=own.dtype)
    with_each = {
        place: nothing.masked_scatter(active, cosines(own, directions["update"], signal)[:n])
        for place, signal in places.items()
    }
    figures: dict[str, float] = {}
    for name, coefficients in directions.items() if "split" in places else ():
        figures |= statistics(name, cosines(own, coefficients, split)[:n])
    figures |= {"chance": conflict_by_chance(own[:n, :n])} if figures else {}
    return ({"split": figures} if figures else {}), with_each


def baselines(gradients: Float[Tensor, "reward parameter"], draws: torch.Generator) -> dict[str, Tensor]:
    """Directions to compare an update with, (parameter,) each."""
    units = gradients / gradients.norm(dim=1, keepdim=True)
    random = torch.randn(gradients.shape[1], generator=draws).to(gradients.device)
    return {"mean": gradients.mean(0), "unit_mean": units.mean(0), "random": random}


def update_of(module: DiffusionNFT) -> Float[Tensor, " parameter"]:
    """The gradient about to be applied, flat: the accumulated gradient and, on a refresh, the merged gradient."""
    accumulated = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in module.trainable])
    return module.step.merged.plus(accumulated)


def merges_columns(balancer: Balancer) -> bool:
    """Whether the balancer's columns differ from the rewards' own advantages."""
    levels = ("merge_rewards", "merge_advantages")
    return any(getattr(type(balancer), level) is not getattr(Balancer, level) for level in levels)


def column_weights(module: DiffusionNFT) -> Float[Tensor, " column"]:
    """The weight of each column of `gradients_of_halves` in the update, float64 on the CPU."""
    balancer, k = module.balancer, len(module.rewards)
    weights = balancer.loss_weights.double()
    return torch.cat([weights.new_zeros(k + 1), weights] if merges_columns(balancer) else [weights, weights.new_zeros(1)])


@torch.enable_grad()
def gradients_of_halves(
    module: DiffusionNFT, rollout: Rollout, scores: Float[Tensor, "image reward"], seed: int, step: int
) -> tuple[Float[Tensor, "half column parameter"], Float[Tensor, "half column"]]:
    """Gradients over the micro-batches of one optimizer step of a round, in parts from the halves of its prompts.

    The columns are the rewards, the rewards' plain sum, and the balancer's columns where it merges rewards or advantages.
    All ranks must call it. The state of the training does not change.

    Args:
        module: A module in training.
        rollout: The round.
        scores: The scores of the round's images.
        seed: Seed that the round was sampled with.
        step: Index of the optimizer step in the round.

    Returns:
        Parts (2, column, parameter), which add up to the gradients, and the samples of each half that each column applies
        to, up to a factor; both are means over ranks.
    """
    summed = WeightedSum()
    summed.bind(tuple(module.rewards))
    mergers = [None, summed, *([module.balancer] if merges_columns(module.balancer) else [])]
    coefficients = [
        reduce(Coefficients.concat, columns)
        for columns in zip(*(module.compute_coefficients(rollout, scores, seed, merger) for merger in mergers), strict=True)
    ]
    size = coefficients[0].plus.shape[1]
    parts = torch.zeros(2 * size, sum(p.numel() for p in module.trainable), device=module.device)
    samples = torch.zeros(2, size, device=module.device)
    first = step * module.plan.per_step
    for batch in islice(module.split_round(rollout, coefficients, seed), first, first + module.plan.per_step):
        halves = batch.coefficients.split(batch.in_first)
        samples += halves.samples.unflatten(0, (2, -1))
        with module.trainer.precision_plugin.forward_context():
            old, _ = module.step.frozen_velocities(batch, with_kl=False)
        with module.step.per_reward.capture():
            with module.trainer.precision_plugin.forward_context():
                plus, minus, _ = module.step.sample_losses_and_kl(batch, old, None)
            parts += module.step.per_reward(plus, minus, halves, module.scaler)
    strategy = module.trainer.strategy
    return strategy.reduce(parts).unflatten(0, (2, -1)), strategy.reduce(samples)
