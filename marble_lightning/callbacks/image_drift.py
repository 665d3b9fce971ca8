"""The callback that logs statistics of a round's images, and warns when they leave the base policy's range."""

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
"""Lower bounds of the standard deviations; smaller changes are not visible. One white background changes clipping a lot."""
CONFIDENCE = 0.9
"""Confidence that the true standard deviation over prompts is at most the assumed one."""

Reference = dict[str, tuple[float, float]]
"""Mean and spread of each statistic over prompts; the spread is an upper bound of the standard deviation."""


def reference_of(figures: Float[Tensor, "prompt statistic"]) -> Reference:
    r"""Mean and spread over prompts of each statistic of the base policy's images.

    The spread is the upper confidence bound $s \sqrt{(n - 1) / \chi^2_{n-1}(0.1)}$ of the standard deviation $s$ over $n$
    prompts: 2.3 s for 4 prompts, 1.3 s for 18, 1.2 s for 48.

    Raises:
        ValueError: There are fewer than two prompts, so that the standard deviation is undefined.
    """
    freedom = len(figures) - 1
    if freedom < 1:
        raise ValueError(f"A spread over prompts needs at least two. Found {len(figures)}.")
    wider = (freedom / chi2.ppf(1 - CONFIDENCE, freedom)) ** 0.5
    means, spreads = figures.double().mean(0), figures.double().std(0) * wider
    return {name: (mean, spread) for name, mean, spread in zip(NAMES, means.tolist(), spreads.tolist(), strict=True)}


def expected_range(name: str, reference: tuple[float, float], factor: float) -> tuple[float, float]:
    """Range of a round's mean: from mean - min(factor * spread, (1 - 1 / (2 factor)) mean) to mean + factor * spread.

    No statistic can be negative. So if prompts differ much and mean - factor * spread is below 0, the lower limit is still
    mean / (2 factor). Both limits are at least `factor` times `MIN_STD` away from the mean.

    >>> expected_range("diversity", (0.5, 0.1), factor=2.0), expected_range("diversity", (0.5, 0.4), factor=2.0)
    ((0.3, 0.7), (0.125, 1.3))
    """
    mean, spread = reference
    least, wide = factor * MIN_STD[name], factor * spread
    return mean - max(least, min(wide, mean * (1 - 1 / (2 * factor)))), mean + max(least, wide)


class ImageDriftMonitor(Callback):
    """Logs `images/{statistic}` of every round's images, and warns when a statistic leaves the base policy's range.

    If a policy exploits a weakness of its rewards, rewards increase while images get worse. Simple statistics often show it
    (see `image_statistics`): images are too bright, too saturated or too sharp, or all images of a prompt are alike. The
    reference is the first round, which the untrained policy samples; checkpoints keep it. A round's value is the mean over
    the prompts of all ranks. It is expected within `factor` spreads of the reference's mean (exact formula:
    `expected_range`). Rounds of few prompts have wide ranges. The callback does not change the run.

    Args:
        factor: Distance from the base policy's mean, in spreads over prompts, at which a statistic is out of its range,
            > 0; `.inf` only logs.
        patience: Number of successive rounds that a statistic must be out of its range before a warning, >= 1. The warning
            is not repeated until the statistic has returned to its range.
    """

    def __init__(self, factor: float = 2.0, patience: int = 2) -> None:
        if not factor > 0:
            raise ValueError(f"`image_drift.factor` must be > 0. Found {factor}; 2 is usual.")
        if patience < 1:
            raise ValueError(f"`image_drift.patience` must be >= 1. Found {patience}; 1 warns at once.")
        self.factor, self.patience = factor, patience
        self.reference: Reference | None = None
        self.outside = dict.fromkeys(NAMES, 0)
        """Rounds in a row that each statistic has been out of its range."""
        self.warned_of_no_reference = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        of_rank = getattr(pl_module, "image_statistics", None)
        if batch_idx == 0 and of_rank is not None:
            statistics = trainer.strategy.all_gather(of_rank).reshape(-1, len(NAMES)).cpu()
            means = dict(zip(NAMES, statistics.double().mean(0).tolist(), strict=True))
            metrics = {f"images/{name}": value for name, value in means.items()}
            pl_module.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
            self._check(trainer, statistics, means)

    def _check(self, trainer: Trainer, statistics: Tensor, means: dict[str, float]) -> None:
        if trainer.global_step == 0:
            self.reference = reference_of(statistics) if len(statistics) > 1 else None
            self.outside = dict.fromkeys(NAMES, 0)
        if self.reference is None:
            self._warn_of_no_reference(trainer)
            return
        for name, value in means.items():
            low, high = expected_range(name, self.reference[name], self.factor)
            self.outside[name] = 0 if low <= value <= high else self.outside[name] + 1  # NaN is outside
            if self.outside[name] == self.patience:
                warn(
                    f"Round {trainer.current_epoch}: images/{name} = {value:.3f} is out of the base policy's range, "
                    f"{low:.3f} to {high:.3f}, {self.patience} round(s) in a row. Rewards may increase although images "
                    "get worse: compare held-out images with the base's. If they got worse, start again with a higher "
                    "`model.objective.kl_weight`, a lower learning rate or an additional reward; if not, raise "
                    "`image_drift.factor`."
                )

    def _warn_of_no_reference(self, trainer: Trainer) -> None:
        if not self.warned_of_no_reference:
            cause = (
                "resumes from a checkpoint without it" if trainer.global_step else "has one prompt a round, thus no spread"
            )
            warn(
                "Statistics of images are logged but not checked: the base policy's range is not known, "
                f"since the run {cause}."
            )
            self.warned_of_no_reference = True

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "outside": self.outside}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference, self.outside = state_dict["reference"], dict(state_dict["outside"])
