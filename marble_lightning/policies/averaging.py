"""Averaging: how the `old` and `ema` adapters follow the `trained` one."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from marble_lightning.policies.base import FlowPolicy
from marble_lightning.utils.validation import require

MIN_MOVE = 1e-6
"""Smallest expected move of the old adapter, as a share of the adapter's norm, that float32 surely resolves."""


@dataclass(frozen=True)
class Averaging:
    """How the `old` and `ema` adapters follow the `trained` one. For a custom schedule, override `old_decay` in a subclass.

    DiffusionNFT's runs: `old_rate` 0.001 and `old_cap` 0.5; 0 and 0 for on-policy; 0.0075, `old_start` 75 and 0.999 for its
    OCR run. MARBLE's release: 0.001 and 0.95.

    Args:
        old_rate: The decay of the old adapter after optimizer step s is min(old_rate * (s - old_start), old_cap), >= 0.
        old_start: Optimizer step before which the old adapter is a copy of the trained one.
        old_cap: Maximum decay of the old adapter, in [0, 1).
        ema_decay: Decay per optimizer step of the averaged adapter, in [0, 1).
        ema_warmup: Whether the decay after optimizer step s is at most (1 + s) / (10 + s), as in the release: the initial
            adapter then loses its weight in the average sooner.

    Source: DiffusionNFT, arXiv 2509.16117, and its released code; MARBLE, arXiv 2605.06507, and its released code.
    """

    old_rate: float = 0.001
    old_start: int = 0
    old_cap: float = 0.95
    ema_decay: float = 0.9
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        require(0 <= self.old_rate < inf, "`averaging.old_rate` must be >= 0 and finite", self.old_rate)
        require(self.old_start >= 0, "`averaging.old_start` must be >= 0", self.old_start)
        require(0 <= self.old_cap < 1, "`averaging.old_cap` must be in [0, 1)", self.old_cap)
        require(0 <= self.ema_decay < 1, "`averaging.ema_decay` must be in [0, 1)", self.ema_decay)

    def old_decay(self, step: int) -> float:
        """Decay of the old adapter after optimizer step `step`: the share of its value that it keeps, in [0, 1]."""
        return min(self.old_rate * max(step - self.old_start, 0), self.old_cap)

    def averaged_decay(self, step: int) -> float:
        """Decay of the averaged adapter after optimizer step `step`: the share of its value that it keeps, in [0, 1].

        >>> Averaging(ema_warmup=True).averaged_decay(1), Averaging(ema_warmup=True).averaged_decay(1000)
        (0.18181818181818182, 0.9)
        """
        return min((1 + step) / (10 + step), self.ema_decay) if self.ema_warmup else self.ema_decay

    def update_averaged(self, policy: FlowPolicy, step: int) -> None:
        """Move the averaged adapter towards the trained one, after optimizer step `step`.

        Raises:
            ValueError: A subclass returned a decay outside [0, 1].
        """
        policy.lerp_adapter("ema", towards="trained", by=1 - self._checked("averaged_decay", self.averaged_decay(step)))

    def update_old(self, policy: FlowPolicy, step: int) -> None:
        """Move the old adapter towards the trained one, after optimizer step `step`, the last of a round.

        Raises:
            RuntimeError: The old adapter should have moved, and is not nearer to the trained one than before.
            ValueError: A subclass returned a decay outside [0, 1].
        """
        decay = self._checked("old_decay", self.old_decay(step))
        distance, norm = old_to_trained(policy)
        policy.lerp_adapter("old", towards="trained", by=1 - decay)
        if (1 - decay) * distance > MIN_MOVE * norm and old_to_trained(policy)[0] >= distance:
            raise RuntimeError(
                "The old adapter must move towards the trained one after a round, since it samples the next one. Found it "
                f"no nearer than before, at a distance of {distance:.3g}, with a decay of {decay:g}. Correct `lerp_adapter` "
                f"and `parameters_of` of {type(policy).__name__}."
            )

    def _checked(self, name: str, decay: float) -> float:
        require(0 <= decay <= 1, f"`{name}` of {type(self).__name__} must return 0 to 1", decay)
        return decay


@torch.no_grad()
def old_to_trained(policy: FlowPolicy) -> tuple[float, float]:
    """The norm of the difference of the old and the trained adapter, and the norm of the trained one."""
    pairs = zip(policy.parameters_of("old"), policy.parameters_of("trained"), strict=True)
    norms = [torch.stack([(old - trained).norm(), trained.norm()]) for old, trained in pairs]
    distance, norm = torch.stack(norms).norm(dim=0).tolist()
    return distance, norm
