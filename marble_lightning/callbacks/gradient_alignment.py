"""Gradient alignment: cosines of an update with each reward's gradient, at refreshes, between them, and on fresh images."""

from __future__ import annotations

from itertools import islice, product
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from balancers import Balancer, WeightedSum
from balancers.gramian import agreement, conflict_by_chance, gram_matrix
from balancers.merging import active_rows
from marble_lightning.checks import get_balancer
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.reward_gradients import flat
from marble_lightning.nft.rollout import Rollout
from marble_lightning.utils.images import cosine_heatmap
from marble_lightning.utils.loggers import log_image, log_metrics
from marble_lightning.utils.seeds import derived_seed, generator


class GradientAlignment(Callback):
    r"""Logs the balancer's diagnostics at each refresh, and probes of updates that are about to be applied.

    At a refresh it logs the merging coefficients, the gradient norms, the cosines between the rewards' gradients (a figure),
    and under `harmony/` the minimum, mean and variance over the rewards of $\cos(d, g_k)$: for the update $d$, for the mean
    of the same gradients (`mean`) and for the mean of unit gradients (`unit_mean`). The paper reports these statistics. With
    newly solved weights, the cosines of the min-norm direction are never below zero. With smoothed weights, which are the
    default, they can be.

    A probe computes the same for the update that the optimizer is about to apply, including the KL term. It is logged as
    `probe/{solved|reused}/{own|fresh}/...`:

    - `solved` at a refresh, `reused` between two refreshes.
    - `own` uses the gradients of the images that the update came from; `fresh` those of an independent round, which are
      unbiased.

    A probe also logs baselines, computed from the images that the update came from:

    - `mean` and `unit_mean`, as above. The mean of gradients of normalised advantages is a strong baseline.
    - `weighted_sum`, the paper's baseline: the gradient for the advantage of the rewards' plain sum.
    - `random`, a random direction. `chance` is the probability that it conflicts with some reward
      (`balancers.gramian.conflict_by_chance`): 97 % for five orthogonal gradients.

    A probe works with every balancer, and does not change the run.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.

    Args:
        probe_every: Optimizer steps between two probes, >= 1; null for none. A probe costs the sampling and scoring of one
            round and the per-reward gradients of two optimizer steps.
    """

    def __init__(self, probe_every: int | None = None) -> None:
        if probe_every is not None and probe_every < 1:
            raise ValueError(f"`gradient_alignment.probe_every` must be >= 1, or null for no probes. Found {probe_every}.")
        self.probe_every = probe_every

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.probe_every and isinstance(pl_module, DiffusionNFT):
            _ = pl_module.step.per_reward  # raises now if per-reward gradients cannot be computed
            balancer = get_balancer(trainer)
            every = balancer.options.refresh_every
            if balancer.needs_gradients and every > 1 and self.probe_every % every == 0:
                rank_zero_warn(
                    f"`probe_every` = {self.probe_every} is a multiple of `refresh_every` = {every}: no "
                    f"probe falls between two refreshes. Use {self.probe_every + 1} for probes of both kinds."
                )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.probe_every and trainer.global_step % self.probe_every == 0 and isinstance(pl_module, DiffusionNFT):
            kind = "solved" if get_balancer(trainer).solved else "reused"
            for place, figures in probe(pl_module, trainer.global_step).items():
                metrics = {f"probe/{kind}/{place}/{name}": value for name, value in figures.items()}
                log_metrics(trainer, metrics, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        balancer = get_balancer(trainer)
        if balancer.diagnostics:
            gram = balancer.diagnostics.pop("gram")
            log_metrics(trainer, refresh_figures(balancer), trainer.global_step)
            if trainer.is_global_zero:
                norms = gram.diagonal().sqrt()
                log_image(trainer, "cosines", cosine_heatmap(gram / norms.outer(norms), balancer.names), trainer.global_step)
            balancer.diagnostics = {}


def refresh_figures(balancer: Balancer) -> dict[str, float]:
    """The diagnostics of a refresh as metrics, by name."""
    figures: dict[str, float] = {}
    for title, value in balancer.diagnostics.items():
        if isinstance(value, Tensor):
            figures |= {f"{title}/{name}": float(v) for name, v in zip(balancer.names, value.tolist(), strict=True)}
        elif isinstance(value, dict):
            for reason, name in product(("zero", "not finite"), balancer.names):
                figures[f"{title}/{reason.replace(' ', '_')}/{name}"] = float(value.get(name) == reason)
        else:
            figures[f"harmony/{title}"] = value
    refreshes = max(balancer.counts["refreshes"], 1)
    for kind in ("update", "mean"):
        figures[f"harmony/{kind}/conflict_rate"] = balancer.counts[f"{kind}_conflicts"] / refreshes
    return figures


def probe(module: DiffusionNFT, step: int) -> dict[str, dict[str, float]]:
    """Alignment of the update about to be applied, on its `own` images and on a `fresh` round of the same policy.

    Both also have the baselines of `GradientAlignment`. Rewards without a gradient are left out. There are no figures for an
    update that is not finite, which a loss scaler skips.

    Args:
        module: A module in training, with all gradients of the step accumulated.
        step: The optimizer step, which also seeds the fresh round.

    Returns:
        Figures by name, for `own` and for `fresh`.
    """
    figures: dict[str, dict[str, float]] = {}
    update, seed = update_of(module), derived_seed(module.seed, "probe", step)
    if not update.isfinite().all():
        return figures
    fresh = module.sample_round(seed)
    places = {
        "own": (module.rollout, module.scores, module.seed, step % (module.plan.total // module.plan.per_step)),
        "fresh": (fresh.rollout, fresh.scores, seed, 0),
    }
    for place, (rollout, scores, round_seed, part) in places.items():
        rows = reward_gradients(module, rollout, scores, round_seed, part)
        gradients, summed = rows[:-1], rows[-1]
        active = active_rows(gram_matrix(gradients).diagonal().sqrt()).to(gradients.device)
        if not active.any():
            break
        gradients = gradients[active]
        if place == "own":
            directions = {"update": update, "weighted_sum": summed, **baselines(gradients, generator(seed, "random"))}
        figures[place] = agreement(directions, gradients) | {"chance": conflict_by_chance(gram_matrix(gradients))}
    return figures


def baselines(gradients: Float[Tensor, "reward parameter"], draws: torch.Generator) -> dict[str, Tensor]:
    """Directions to compare an update with, (parameter,) each."""
    units = gradients / gradients.norm(dim=1, keepdim=True)
    random = torch.randn(gradients.shape[1], generator=draws).to(gradients.device)
    return {"mean": gradients.mean(0), "unit_mean": units.mean(0), "random": random}


def update_of(module: DiffusionNFT) -> Float[Tensor, " parameter"]:
    """The gradient about to be applied, flat: the accumulated gradient and, on a refresh, the merged gradient."""
    accumulated = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in module.trainable])
    return module.step.merged.plus(accumulated)


@torch.enable_grad()
def reward_gradients(
    module: DiffusionNFT, rollout: Rollout, scores: Float[Tensor, "image reward"], seed: int, step: int
) -> Float[Tensor, "reward_and_sum parameter"]:
    """Gradients of each reward and of the rewards' sum, over the micro-batches of one optimizer step of a round.

    All ranks must call it. The state of the training does not change.

    Args:
        module: A module in training.
        rollout: The round.
        scores: The scores of the round's images.
        seed: Seed that the round was sampled with.
        step: Index of the optimizer step in the round.

    Returns:
        (reward + 1, parameter), the mean over ranks; the last row is of the sum.
    """
    total = torch.zeros(len(module.rewards) + 1, sum(p.numel() for p in module.trainable), device=module.device)
    summed = WeightedSum()
    summed.bind(tuple(module.rewards))
    by_balancer = (module.compute_coefficients(rollout, scores, seed, balancer) for balancer in (None, summed))
    coefficients = [of_rewards.concat(of_sum) for of_rewards, of_sum in zip(*by_balancer, strict=True)]
    first = step * module.plan.per_step
    with module.step.per_reward.capture():
        for batch in islice(module.split_round(rollout, coefficients, seed), first, first + module.plan.per_step):
            with module.trainer.precision_plugin.forward_context():
                losses = module.step.sample_losses(batch, module.step.velocity(batch, "trained"))
            total += module.step.per_reward(*losses, batch.coefficients, module.scaler)
    return module.trainer.strategy.reduce(total)
