"""Training that has diverged is stopped, by its name, before anything of it is saved or scored."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.amp import GradScaler

from marble_lightning.utils.distributed import OnAllRanks

LEAST_SCALE = 1e-4
"""A loss scale below this is that of a loss that no scale helps. Source: fairseq's `--min-loss-scale`."""

REMEDY = (
    "Lower the learning rate (`model.optimizer.init_args.lr`) or clip gradients (`trainer.gradient_clip_val`). A run that "
    "goes on from a checkpoint keeps the learning rate it was written with: for another one export it, and begin with "
    "`model.policy.init_lora`."
)


class Diverged(OnAllRanks, RuntimeError):
    """Losses, adapters or images are not finite; raised on all ranks."""


class Finite:
    """Takes note on the device of values that are not finite; the host waits for the device only in a check."""

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def note(self, *values: Tensor) -> None:
        """Look at values, all on one device."""
        for value in values:
            broken = ~value.detach().isfinite().all()
            self._broken = broken if self._broken is None else self._broken | broken

    def _any(self, strategy: Strategy) -> bool:
        """Whether any rank has seen such a value since it last asked; all ranks must ask."""
        broken, self._broken = self._broken, None
        own = torch.zeros((), device=strategy.root_device) if broken is None else broken.float()
        return bool(strategy.reduce(own.to(strategy.root_device), reduce_op="sum") > 0)

    def check_step(self, strategy: Strategy, step: int, scaler: GradScaler | None) -> None:
        """Stop all ranks where losses or adapters were not finite.

        Args:
            strategy: Reaches the other ranks.
            step: Optimizer steps taken.
            scaler: Of the loss, where there is one: it skips a step whose gradients overflowed, and scales less.

        Raises:
            Diverged: On all ranks.
        """
        if self._any(strategy):
            raise Diverged(
                f"Training has diverged: the loss and the adapters must be finite. Found others in optimizer step {step}. "
                f"{REMEDY}"
            )
        if scaler is not None and scaler.get_scale() < LEAST_SCALE:
            raise Diverged(
                f"Training has diverged: gradients must be finite at some scale of the loss. Found others down to "
                f"{scaler.get_scale():.0e}, in optimizer step {step}. {REMEDY}"
            )

    def check_pictures(self, strategy: Strategy, trained: bool) -> None:
        """Stop all ranks where sampled images were not finite, before a reward is asked what it makes of them.

        Args:
            strategy: Reaches the other ranks.
            trained: Whether an adapter sampled them that has been trained.

        Raises:
            Diverged: On all ranks.
        """
        if self._any(strategy):
            why = (
                f"Training has diverged. {REMEDY}"
                if trained
                else "The model's numbers are too large for its precision: choose another `model.policy.dtype`."
            )
            raise Diverged(f"Sampled images must be finite. Found others. {why}")
