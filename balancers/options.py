"""Options that all gradient methods share: when per-reward gradients are computed, and how their weights are used."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """When a gradient method computes weights, on which inner products, and how it uses the weights.

    Args:
        refresh_every: Optimizer steps between two solutions, >= 1.
        ema_decay: rho, how much of the old weights a solution keeps, in [0, 1).
        normalize: Whether `weights` receives unit gradients, which are rescaled to their mean norm afterwards.
        refresh_alpha: Which weights merge the gradients on a refresh: the smoothed ones, or the new ones of this refresh
            (fresh), as in the authors' code. The steps in between use the smoothed ones either way.
        estimate_share: Share of a refresh step's micro-batches whose gradients are used, rounded up, in [0, 1]; 0 is a
            single micro-batch, as in the authors' code.
        uniform_after_step: Optimizer step from which all rewards have equal weight, without gradients. Null: never.
        measure_signal: Whether a refresh computes each gradient as the sum of two parts, from disjoint halves of the
            prompts, which tell signal and noise apart (`SignalGram`). It takes no further backward pass with
            `gradient_passes: two`, and twice the memory for gradients.
        gram: Inner products that `weights` receives: those of the gradients (own), as in the paper, or those of their
            signal, estimated from halves (split).
        gram_decay: How much of the old inner products a refresh keeps, in [0, 1). 0 uses those of this refresh only.
        gram_shrinkage: Whether the estimate of `gram: split` is shrunk towards the gradients' own inner products by its
            measured noise.
        signal_floor: Smallest length of a signal relative to the norm of its gradient, in (0, 1], for `gram: split`.

    Raises:
        ValueError: An option is out of its range.
    """

    refresh_every: int = 1
    ema_decay: float = 0.0
    estimate_share: float = 1.0
    normalize: bool = False
    refresh_alpha: Literal["smoothed", "fresh"] = "smoothed"
    uniform_after_step: int | None = None
    measure_signal: bool = True
    gram: Literal["own", "split"] = "own"
    gram_decay: float = 0.0
    gram_shrinkage: bool = True
    signal_floor: float = 0.15

    def __post_init__(self) -> None:
        if self.refresh_every < 1:
            raise ValueError(f"`refresh_every` must be >= 1. Found {self.refresh_every}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1). Found {self.ema_decay}.")
        if self.refresh_alpha not in ("smoothed", "fresh"):
            raise ValueError(f"`refresh_alpha` must be 'smoothed' or 'fresh'. Found {self.refresh_alpha!r}.")
        if not 0 <= self.estimate_share <= 1:
            raise ValueError(f"`estimate_share` must be in [0, 1]. Found {self.estimate_share}.")
        if self.uniform_after_step is not None and self.uniform_after_step < 0:
            raise ValueError(f"`uniform_after_step` must be >= 0 or null. Found {self.uniform_after_step}.")
        if self.gram not in ("own", "split"):
            raise ValueError(f"`gram` must be 'own' or 'split'. Found {self.gram!r}.")
        if not 0 <= self.gram_decay < 1:
            raise ValueError(f"`gram_decay` must be in [0, 1). Found {self.gram_decay}.")
        if not 0 < self.signal_floor <= 1:
            raise ValueError(f"`signal_floor` must be in (0, 1]. Found {self.signal_floor}.")
        if self.gram == "split" and self.gram_shrinkage and not self.gram_decay:
            raise ValueError(
                "`gram_shrinkage` needs `gram_decay` > 0, since the spread over refreshes tells the noise. Found 0; use 0.9."
            )
        if self.gram == "split" and not self.measure_signal:
            raise ValueError(
                "`gram: split` needs the gradients of two halves. Found `measure_signal: false`; set it to true."
            )

    def is_uniform(self, step: int) -> bool:
        """Whether an optimizer step lies in the last part of the run, with uniform weights."""
        return self.uniform_after_step is not None and step >= self.uniform_after_step

    def is_due(self, step: int) -> bool:
        """Whether an optimizer step is a refresh by its number."""
        return step % self.refresh_every == 0

    @property
    def cadence(self) -> dict[str, Any]:
        """All options but those that do not change the method: `measure_signal`, and those of `gram: split` without it."""
        unused = {"measure_signal"} | ({"gram_shrinkage", "signal_floor"} if self.gram == "own" else set())
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def estimated(self, n_micro_batches: int) -> int:
        """Micro-batches of a refresh step whose gradients are used.

        >>> GradientOptions(estimate_share=0.7).estimated(10), GradientOptions(estimate_share=0).estimated(10)
        (7, 1)
        """
        share = math.ceil(round(self.estimate_share * n_micro_batches, 9))  # 0.7 * 10 is slightly above 7
        return max(share, 1)


CADENCE = tuple(field.name for field in fields(GradientOptions))
"""Options of every gradient method. A method is the published one only with the values of its own config file."""
