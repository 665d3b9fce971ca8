"""How well an update serves every reward: where it was solved for, in between, and on pictures it has not seen."""

from __future__ import annotations

from itertools import product
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from balancers import Balancer
from balancers.harmony import agreement, gram_matrix
from balancers.solution import active_rows
from marble_lightning.checks import the_balancer
from marble_lightning.loggers import log_image, log_metrics
from marble_lightning.module import DiffusionNFT
from marble_lightning.pictures import heat
from marble_lightning.seeds import derived_seed


class Harmony(Callback):
    r"""Logs the balancer's findings at each refresh, and probes of updates about to be applied.

    At a refresh: coefficients, gradient norms, the rewards' cosines with each other (a picture), and under `harmony/` the
    least, mean and variance over the rewards of $\cos(d, g_k)$, for the update $d$ and for the plain mean of the same
    gradients. This is the paper's figure; a min-norm direction cannot score below zero there.

    A probe asks the same of the update that the optimizer is about to take, the KL term included, and is logged as
    `probe/{solved|reused}/{own|fresh}/...`: `reused` on the steps between two refreshes; `own` against the gradients of the
    pictures it came from, `fresh` against those of an independent round, the honest figure. The plain mean is that of the
    pictures the update came from in both places. A probe needs no gradient method, and changes nothing in the run.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.

    Args:
        probe_every: Optimizer steps between two probes, >= 1, null for none. A probe costs a round's sampling and scoring
            and the per-reward gradients of two optimizer steps.
    """

    def __init__(self, probe_every: int | None = None) -> None:
        if probe_every is not None and probe_every < 1:
            raise ValueError(f"`harmony.probe_every` must be >= 1, or null for no probes. Found {probe_every}.")
        self.probe_every = probe_every

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.probe_every and isinstance(pl_module, DiffusionNFT):
            pl_module.per_reward.expect(False)  # raises now where per-reward gradients cannot be had
            balancer = the_balancer(trainer)
            if balancer.needs_gradients and balancer.refresh_every > 1 and self.probe_every % balancer.refresh_every == 0:
                rank_zero_warn(
                    f"`probe_every` = {self.probe_every} is a multiple of `refresh_every` = {balancer.refresh_every}: none "
                    f"falls between two refreshes. Take {self.probe_every + 1} to see both."
                )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.probe_every and trainer.global_step % self.probe_every == 0 and isinstance(pl_module, DiffusionNFT):
            kind = "solved" if the_balancer(trainer).solved else "reused"
            for place, figures in probe(pl_module, trainer.global_step).items():
                shown = {f"probe/{kind}/{place}/{name}": value for name, value in figures.items()}
                log_metrics(trainer, shown, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        balancer = the_balancer(trainer)
        if balancer.diagnostics:
            gram = balancer.diagnostics.pop("gram")
            log_metrics(trainer, refresh_figures(balancer), trainer.global_step)
            if trainer.is_global_zero:
                norms = gram.diagonal().sqrt()
                log_image(trainer, "cosines", heat(gram / norms.outer(norms), balancer.names), trainer.global_step)
            balancer.diagnostics = {}


def refresh_figures(balancer: Balancer) -> dict[str, float]:
    """A refresh's diagnostics as curves."""
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
    """Harmony of the update about to be applied, on its `own` pictures and on a `fresh` round of the same policy.

    Beside it stands the plain mean of its own pictures' gradients, in both places. Rewards without a gradient in a place
    are left out of its figures.

    Args:
        module: A module in training, all gradients of the step gathered.
        step: The optimizer step, which also seeds the fresh round.
    """
    update, figures = module.update(), {}
    seed = derived_seed(module.seed, "probe", step)
    fresh = module.sample_round(seed)
    places = {
        "own": (module.rollout, module.scores, module.seed, step % (module.plan.total // module.plan.per_step)),
        "fresh": (fresh.rollout, fresh.scores, seed, 0),
    }
    for place, (rollout, scores, of, part) in places.items():
        gradients = module.reward_gradients(rollout, scores, of, part)
        active = active_rows(gram_matrix(gradients).diagonal().sqrt()).to(gradients.device)
        if not active.any():
            break
        gradients = gradients[active]
        if place == "own":
            mean = gradients.mean(0)
        figures[place] = agreement(update, mean, gradients)
    return figures
