"""Gradient alignment: cosines of an update with each reward's gradient, at refreshes, between them, and on fresh images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor

from balancers import Balancer
from balancers.gramian import conflict_by_chance, signal_to_noise
from balancers.signal_gram import Products, RunningMean
from marble_lightning.callbacks.alignment_probe import probe
from marble_lightning.callbacks.alignment_summary import AlignmentSummary
from marble_lightning.checks import get_balancer
from marble_lightning.module import DiffusionNFT
from marble_lightning.utils.images import cosine_heatmap
from marble_lightning.utils.loggers import log_image, log_metrics

SIGNAL_DECAY = 0.97
"""How much of the old products of halves the logged signal-to-noise ratio keeps at a refresh."""


class GradientAlignment(Callback):
    r"""Logs the balancer's diagnostics at each refresh, and probes of updates that are about to be applied.

    At a refresh it logs the merging coefficients, the gradient norms, the cosines between the rewards' gradients (a figure),
    and under `harmony/` the minimum, mean and variance over the rewards of $\cos(d, g_k)$: for the update $d$ (`update`),
    for the weights that the steps since the last refresh have used (`reused`), for the mean of the same gradients (`mean`)
    and for the mean of unit gradients (`unit_mean`). The paper reports these statistics. With newly solved weights, the
    cosines of the min-norm direction are never below zero. With smoothed weights, which are the default, they can be.

    These cosines are positive even without any signal, since the update contains the noise of each gradient. So each has an
    honest counterpart under `harmony/split/` from products of disjoint halves of the prompts, which share no noise, and
    `chance`, the probability that a random direction conflicts with some reward
    (`balancers.gramian.conflict_by_chance`): 97 % for five orthogonal gradients. They are unbiased for weights that do not
    depend on the same images: `reused`, `mean`, and nearly so for `update`. `cosine/{update|reused}/{own|split}/` has
    the cosine with each reward, and `signal_to_noise/` the length of its signal relative to its noise, averaged over
    refreshes.

    A probe computes the same for the update that the optimizer is about to apply. It is logged as
    `probe/{solved|reused}/{own|split|fresh}/...`:

    - `solved` at a refresh, `reused` between two refreshes.
    - `own` uses the gradients of the images that the update came from; `split` products of halves of these images, without
      the KL term; `fresh` the gradients of an independent round. The latter two are unbiased.

    A probe also logs baselines, computed from the images that the update came from:

    - `mean` and `unit_mean`, as above. The mean of gradients of normalised advantages is a strong baseline.
    - `weighted_sum`, the paper's baseline: the gradient for the advantage of the rewards' plain sum.
    - `random`, a random direction, and `chance`.

    A probe works with every balancer, and does not change the run. For balancers without refreshes it also logs `cosine/`
    and `signal_to_noise/`. It takes the memory of two parts of each reward's gradient, of the sum's, and of those of a
    balancer that merges rewards or advantages.

    At the end of a run a table has each reward's mean cosines, its signal-to-noise ratio, and its training mean in the first
    and last quarter of the rounds. A warning names rewards whose training mean fell although their own-image cosines were
    positive.

    Source: MARBLE, arXiv 2605.06507, gradient harmony table.

    Args:
        probe_every: Optimizer steps between two probes, >= 1; null for none. A probe costs the per-reward gradients of one
            optimizer step.
        fresh: Whether a probe also uses fresh images, which costs the sampling and scoring of one round and the per-reward
            gradients of another optimizer step.
    """

    def __init__(self, probe_every: int | None = None, fresh: bool = True) -> None:
        if probe_every is not None and probe_every < 1:
            raise ValueError(f"`gradient_alignment.probe_every` must be >= 1, or null for no probes. Found {probe_every}.")
        self.probe_every, self.fresh = probe_every, fresh
        self.summary = AlignmentSummary()
        self.signal: tuple[RunningMean, RunningMean] | None = None
        """Means over refreshes of the gradients' products, and of the products of halves."""

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
        if not (self.probe_every and trainer.global_step % self.probe_every == 0 and isinstance(pl_module, DiffusionNFT)):
            return
        balancer = get_balancer(trainer)
        kind = "solved" if balancer.solved else "reused"
        found = probe(pl_module, trainer.global_step, self.fresh)
        for place, figures in found.by_place.items():
            metrics = {f"probe/{kind}/{place}/{name}": value for name, value in figures.items()}
            log_metrics(trainer, metrics, trainer.global_step)
        refreshes = balancer.needs_gradients and not balancer.options.is_uniform(balancer.step)
        if found.products is not None and not refreshes:
            cosines = {f"cosine/update/{place}": values for place, values in found.cosines.items()}
            self._note(trainer, balancer.reward_names, cosines, found.products)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        balancer = get_balancer(trainer)
        if not balancer.diagnostics:
            return
        products = balancer.diagnostics.pop("products")
        figures = refresh_figures(balancer)
        if "split/update/cos_min" in balancer.diagnostics:
            active = balancer.active
            figures["harmony/split/chance"] = conflict_by_chance(products.own[active][:, active])
        log_metrics(trainer, figures, trainer.global_step)
        cosines = {title: value for title, value in balancer.diagnostics.items() if title.startswith("cosine/")}
        if cosines:  # a refresh without any usable gradient has none
            self._note(trainer, balancer.names, cosines, products.where(balancer.active))
        if trainer.is_global_zero:
            norms = products.own.diagonal().sqrt()
            heatmap = cosine_heatmap(products.own / norms.outer(norms), balancer.names)
            log_image(trainer, "cosines", heatmap, trainer.global_step)
        balancer.diagnostics = {}

    def _note(
        self, trainer: Trainer, names: Sequence[str], cosines: dict[str, Float[Tensor, " reward"]], products: Products
    ) -> None:
        """Log the cosines with each reward and its signal-to-noise ratio, and keep them for the summary."""
        if self.signal is None:
            self.signal = RunningMean(len(names), SIGNAL_DECAY), RunningMean(len(names), SIGNAL_DECAY)
        for mean, values in zip(self.signal, (products.own, products.split), strict=True):
            mean.update(values)
        ratio = signal_to_noise(*(mean.mean for mean in self.signal))
        tensors = {**cosines, "signal_to_noise": ratio}
        log_metrics(trainer, finite(by_reward(tensors, names)), trainer.global_step)
        kind = "reused" if get_balancer(trainer).options.refresh_every > 1 and "cosine/reused/own" in cosines else "update"
        self.summary.note_cosines(cosines[f"cosine/{kind}/own"], cosines.get(f"cosine/{kind}/split"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and isinstance(pl_module, DiffusionNFT):
            means = [float(pl_module.round_metrics[f"train/{name}"]) for name in pl_module.rewards]
            self.summary.note_round(trainer.current_epoch, means)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.signal is not None:
            ratio = signal_to_noise(*(mean.mean for mean in self.signal))
            Console(width=110).print(self.summary.table(get_balancer(trainer).reward_names, ratio))
            for message in self.summary.warnings(get_balancer(trainer).reward_names):
                rank_zero_warn(message)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The means of products and cosines, so that a resumed run has the same figures."""
        signal = [mean.state_dict() for mean in self.signal or ()]
        return {"signal": signal, "summary": self.summary.state_dict()} if signal or self.summary.rounds else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`."""
        means = []
        for state in state_dict["signal"]:
            means.append(RunningMean(len(state["mean"]), SIGNAL_DECAY))
            means[-1].load_state_dict(state)
        self.signal = (means[0], means[1]) if means else None
        self.summary.load_state_dict(state_dict["summary"])


def refresh_figures(balancer: Balancer) -> dict[str, float]:
    """The diagnostics of a refresh as metrics, by name; the cosines with each reward are logged by the callback."""
    figures: dict[str, float] = {}
    for title, value in balancer.diagnostics.items():
        if title.startswith("cosine/"):
            continue
        if isinstance(value, Tensor):
            figures |= by_reward({title: value}, balancer.names)
        elif isinstance(value, dict):
            for reason, name in product(("zero", "not finite"), balancer.names):
                figures[f"{title}/{reason.replace(' ', '_')}/{name}"] = float(value.get(name) == reason)
        else:
            figures[f"harmony/{title}"] = value
    refreshes = max(balancer.counts["refreshes"], 1)
    for kind in ("update", "mean"):
        figures[f"harmony/{kind}/conflict_rate"] = balancer.counts[f"{kind}_conflicts"] / refreshes
    return figures


def by_reward(tensors: dict[str, Float[Tensor, " reward"]], names: Sequence[str]) -> dict[str, float]:
    """One metric for each reward of each tensor."""
    return {
        f"{title}/{name}": value
        for title, tensor in tensors.items()
        for name, value in zip(names, tensor.tolist(), strict=True)
    }


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without NaN, which stands for a reward that has no estimate."""
    return {name: value for name, value in metrics.items() if value == value}
