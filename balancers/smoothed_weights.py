"""The state of a gradient method: weights of each reward, smoothed over refreshes."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from balancers.merging import smooth

STATE = ("alpha_smoothed", "solved_at")
"""Names of the state's tensors, in a balancer's checkpoint too."""


class SmoothedWeights:
    r"""Smoothed weights $\bar\alpha_k$, updated for the active rewards of each refresh.

    Args:
        initial: Weights (K,) of rewards that have never been active.
        decay: rho, how much of the old values a refresh keeps, in [0, 1).

    Source: MARBLE, arXiv 2605.06507, eq. 12.
    """

    def __init__(self, initial: Float[Tensor, " reward"], decay: float) -> None:
        self.initial, self.decay = initial, decay
        self.alpha_smoothed = torch.full_like(initial, torch.nan)
        self.solved_at = torch.zeros(len(initial), dtype=torch.int64)

    @property
    def empty(self) -> bool:
        """Whether no reward has ever been active."""
        return bool(self.alpha_smoothed.isnan().all())

    @property
    def alpha(self) -> Float[Tensor, " reward"]:
        """Smoothed weights; the initial ones where a reward has never been active."""
        return torch.where(self.alpha_smoothed.isnan(), self.initial, self.alpha_smoothed)

    def update(self, alpha: Float[Tensor, " reward"], active: Bool[Tensor, " reward"], step: int) -> None:
        """Add the weights of a refresh at an optimizer step, for active rewards only."""
        self.alpha_smoothed = smooth(self.alpha_smoothed, alpha, active, self.decay)
        self.solved_at[active] = step

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the state; NaN where a reward has never been active."""
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict`."""
        for name in STATE:
            setattr(self, name, state[name].clone())
