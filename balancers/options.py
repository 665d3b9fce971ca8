"""Options that all gradient methods share: when per-reward gradients are computed, and how their weights are used."""

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """When a gradient method computes weights, and how it uses them. `Balancer` explains each option.

    Raises:
        ValueError: An option is out of its range.
    """

    refresh_every: int = 1
    ema_decay: float = 0.0
    estimate_share: float = 1.0
    normalize: bool = False
    refresh_alpha: Literal["smoothed", "fresh"] = "smoothed"
    amortize: Literal["raw", "scaled"] = "raw"
    uniform_after_step: int | None = None

    def __post_init__(self) -> None:
        if self.refresh_every < 1:
            raise ValueError(f"`refresh_every` must be >= 1. Found {self.refresh_every}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1). Found {self.ema_decay}.")
        if self.amortize not in ("raw", "scaled"):
            raise ValueError(f"`amortize` must be 'raw' or 'scaled'. Found {self.amortize!r}.")
        if self.refresh_alpha not in ("smoothed", "fresh"):
            raise ValueError(f"`refresh_alpha` must be 'smoothed' or 'fresh'. Found {self.refresh_alpha!r}.")
        if not 0 <= self.estimate_share <= 1:
            raise ValueError(f"`estimate_share` must be in [0, 1]. Found {self.estimate_share}.")
        if self.uniform_after_step is not None and self.uniform_after_step < 0:
            raise ValueError(f"`uniform_after_step` must be >= 0 or null. Found {self.uniform_after_step}.")

    def is_uniform(self, step: int) -> bool:
        """Whether an optimizer step lies in the final stage with uniform weights."""
        return self.uniform_after_step is not None and step >= self.uniform_after_step

    def is_due(self, step: int) -> bool:
        """Whether an optimizer step is a refresh by its number."""
        return step % self.refresh_every == 0

    def estimated(self, n_micro_batches: int) -> int:
        """Micro-batches of a refresh step whose gradients are used.

        >>> GradientOptions(estimate_share=0.7).estimated(10), GradientOptions(estimate_share=0).estimated(10)
        (7, 1)
        """
        share = math.ceil(round(self.estimate_share * n_micro_batches, 9))  # 0.7 * 10 is slightly above 7
        return max(share, 1)


CADENCE = tuple(field.name for field in fields(GradientOptions))
"""Options of every gradient method. A method is the published one only with the values of its own config file."""
