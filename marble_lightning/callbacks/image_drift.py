"""Alarms: the look of a round's images, beside the rewards, and a word when it is no longer the base policy's."""

from __future__ import annotations

import logging
from typing import Any

from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from scipy.stats import chi2
from torch import Tensor

from marble_lightning.evaluation.image_statistics import NAMES

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)

MIN_STD = dict.fromkeys(NAMES, 0.01) | {"clipping": 0.05}
"""Spreads below these count as these: less cannot be seen. A single white background among the prompts moves clipping."""
CONFIDENCE = 0.9
"""Confidence with which the spread over all prompts is no wider than the one that is reckoned with."""

Reference = dict[str, tuple[float, float]]
"""Mean and spread of each statistic over prompts."""


def reference_of(figures: Float[Tensor, "prompt statistic"]) -> Reference:
    r"""What the base policy's images look like: mean and spread over prompts, the spread of few prompts taken wider.

    The spread is the upper confidence bound $s \sqrt{(n - 1) / \chi^2_{n-1}(0.1)}$ of the standard deviation $s$ over $n$
    prompts: 2.3 s for 4 prompts, 1.3 s for 18, 1.2 s for 48.

    Raises:
        ValueError: Fewer than two prompts, which have no spread.
    """
    freedom = len(figures) - 1
    if freedom < 1:
        raise ValueError(f"A spread over prompts needs at least two. Found {len(figures)}.")
    wider = (freedom / chi2.ppf(1 - CONFIDENCE, freedom)) ** 0.5
    means, spreads = figures.double().mean(0), figures.double().std(0) * wider
    return {name: (mean, spread) for name, mean, spread in zip(NAMES, means.tolist(), spreads.tolist(), strict=True)}


def expected_range(name: str, reference: tuple[float, float], factor: float) -> tuple[float, float]:
    """Where a round's mean is expected: mean - min(factor * spread, (1 - 1 / (2 factor)) mean) to mean + factor * spread.

    No statistic can be negative. So where prompts differ much, a fall to less than a (2 factor)-th of the mean is one too
    many, though `factor` spreads reach below 0. Neither side is nearer than `factor` times `MIN_STD`.

    >>> expected_range("diversity", (0.5, 0.1), factor=2.0), expected_range("diversity", (0.5, 0.4), factor=2.0)
    ((0.3, 0.7), (0.125, 1.3))
    """
    mean, spread = reference
    least, wide = factor * MIN_STD[name], factor * spread
    return mean - max(least, min(wide, mean * (1 - 1 / (2 * factor)))), mean + max(least, wide)


class ImageDriftMonitor(Callback):
    """Logs `images/{statistic}` of every round's images, and warns when one leaves the base policy's range.

    Rewards go up while images get worse where a policy has found a weakness of its judges. That often shows in plain
    statistics (see `image_statistics`): too bright, too saturated, too sharp, all images of a prompt alike. The reference
    is the first round, which the untrained policy samples; checkpoints keep it. A round's value is the mean over the prompts
    of all ranks, expected within `factor` spreads over prompts of the reference's mean (`expected_range` says it exactly).
    Rounds of few prompts have wide ranges. Nothing in the run is changed.

    Args:
        factor: Spreads a statistic may be away from the base policy's mean, > 0; `.inf` only logs.
        patience: Rounds in a row a statistic must be out of its range before a warning, >= 1. There is one warning until it
            is in its range again.
    """

    def __init__(self, factor: float = 2.0, patience: int = 2) -> None:
        if not factor > 0:
            raise ValueError(f"`alarms.factor` must be > 0. Found {factor}; 2 is usual.")
        if patience < 1:
            raise ValueError(f"`alarms.patience` must be >= 1. Found {patience}; 1 warns at once.")
        self.factor, self.patience = factor, patience
        self.reference: Reference | None = None
        self.outside = dict.fromkeys(NAMES, 0)
        """Rounds in a row that each statistic has been out of its range."""
        self.told_why_not = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        own = getattr(pl_module, "image_statistics", None)
        if batch_idx == 0 and own is not None:
            everyone = trainer.strategy.all_gather(own).reshape(-1, len(NAMES)).cpu()
            means = dict(zip(NAMES, everyone.double().mean(0).tolist(), strict=True))
            figures = {f"images/{name}": value for name, value in means.items()}
            pl_module.log_dict(figures, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            self._score(trainer, everyone, means)

    def _score(self, trainer: Trainer, figures: Tensor, means: dict[str, float]) -> None:
        if trainer.global_step == 0:
            self.reference = reference_of(figures) if len(figures) > 1 else None
            self.outside = dict.fromkeys(NAMES, 0)
        if self.reference is None:
            self._tell_why_not(trainer)
            return
        for name, value in means.items():
            low, high = expected_range(name, self.reference[name], self.factor)
            self.outside[name] = 0 if low <= value <= high else self.outside[name] + 1  # NaN is outside
            if self.outside[name] == self.patience:
                warn(
                    f"Round {trainer.current_epoch}: images/{name} = {value:.3f} is out of the base policy's range, "
                    f"{low:.3f} to {high:.3f}, {self.patience} round(s) in a row. Rewards may be going up by the "
                    "look alone: compare held-out images with the base's. If they got worse, start again with a higher "
                    "`model.objective.kl_weight`, a lower learning rate or another reward beside; if not, raise "
                    "`alarms.factor`."
                )

    def _tell_why_not(self, trainer: Trainer) -> None:
        if not self.told_why_not:
            cause = (
                "goes on from a checkpoint without one" if trainer.global_step else "has one prompt a round, thus no spread"
            )
            warn(
                "Statistics of images are logged but not judged: the base policy's range is not known, "
                f"since the run {cause}."
            )
            self.told_why_not = True

    @property
    def state_key(self) -> str:
        return "Alarms"  # its name in checkpoints of before

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "outside": self.outside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference, self.outside = state_dict["reference"], dict(state_dict["outside"])
