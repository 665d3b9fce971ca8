"""Metrics that fall below the base's although rewards rise: a sign that the policy exploits its rewards."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from scipy.stats import t
from torch import Tensor

from marble_lightning.evaluation.statistics import Summary, changes

SIGNIFICANCE = 0.01
"""One-sided probability of a change by chance below which a mean has risen or fallen."""


def clear_change(change: Summary) -> int:
    """The sign of a mean change by a one-sided t-test; 0 if chance can explain it, or if fewer than two prompts have it.

    >>> clear_change(Summary(-0.5, 0.1, 20)), clear_change(Summary(0.1, 0.1, 20)), clear_change(Summary(0.1, 0.01, 1))
    (-1, 0, 0)
    """
    if change.n < 2 or not abs(change.mean) > t.isf(SIGNIFICANCE, change.n - 1) * change.error:
        return 0
    return 1 if change.mean > 0 else -1


def fallen_metrics(
    trained_on: Mapping[str, bool], base: Float[Tensor, "prompt reward"], trained: Float[Tensor, "prompt reward"]
) -> list[str]:
    """A sentence for each metric that has fallen below the base's scores, if a reward has risen above them.

    Args:
        trained_on: For each column of the scores its name, and whether it is trained on: rewards are, metrics are not.
        base: Held-out scores of the base, NaN where there is none.
        trained: Held-out scores of the trained policy for the same prompts and noise.
    """
    columns = dict(zip(trained_on, changes(base, trained), strict=True))
    risen = [name for name, change in columns.items() if trained_on[name] and clear_change(change) > 0]
    fallen = {name: change for name, change in columns.items() if not trained_on[name] and clear_change(change) < 0}
    return [
        f"held_out/{name} has fallen below the base's by {-change.mean:.4g} ± {change.error:.2g}, although "
        f"{', '.join(risen)} rose. No reward trains on it, so the policy may exploit its rewards: compare held-out images "
        "with the base's. ModelCheckpoint and EarlyStopping can monitor it, to keep the best checkpoint and to stop."
        for name, change in fallen.items()
        if risen
    ]
