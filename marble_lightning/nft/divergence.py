"""Checks that stop training that has diverged, before its results are saved or scored."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.amp import GradScaler

from marble_lightning.utils.distributed import OnAllRanks

MIN_LOSS_SCALE = 1e-4
"""Below this loss scale training counts as diverged. Source: fairseq's `--min-loss-scale`."""

REMEDY = (
    "Lower the learning rate (`model.optimizer.init_args.lr`) or clip gradients (`trainer.gradient_clip_val`). A run that "
    "resumes from a checkpoint keeps the checkpoint's learning rate: for another one, export the checkpoint and start a run "
    "with `model.policy.init_lora`."
)


class Diverged(OnAllRanks, RuntimeError):
    """Losses, adapters or images are not finite; raised on all ranks."""


class Finite:
    """Records on the device whether values are finite; the host waits for the device only in a check."""

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def note(self, *values: Tensor) -> None:
        """Record whether values, all on one device, are finite."""
        for value in values:
            broken = ~value.detach().isfinite().all()
            self._broken = broken if self._broken is None else self._broken | broken

    def _any(self, strategy: Strategy) -> bool:
        """Whether any rank has recorded a value that is not finite since the last call; all ranks must call this."""
        broken, self._broken = self._broken, None
        flag = torch.zeros((), device=strategy.root_device) if broken is None else broken.float()
        return bool(strategy.reduce(flag.to(strategy.root_device), reduce_op="sum") > 0)

    def check_step(self, strategy: Strategy, step: int, scaler: GradScaler | None) -> None:
        """Stop all ranks if losses or adapters are not finite.

        Args:
            strategy: Communicates with the other ranks.
            step: Optimizer steps taken.
            scaler: The loss scaler, or None: it skips a step with overflowed gradients and lowers the loss scale.

        Raises:
            Diverged: Losses or adapters are not finite, or the loss scale is too small; raised on all ranks.
        """
        if self._any(strategy):
            raise Diverged(
                f"Training has diverged: the loss and the adapters must be finite. Found others in optimizer step {step}. "
                f"{REMEDY}"
            )
        if scaler is not None and scaler.get_scale() < MIN_LOSS_SCALE:
            raise Diverged(
                f"Training has diverged: gradients must be finite at some scale of the loss. Found others down to "
                f"{scaler.get_scale():.0e}, in optimizer step {step}. {REMEDY}"
            )

    def check_images(self, strategy: Strategy, trained: bool) -> None:
        """Stop all ranks if sampled images are not finite.

        Args:
            strategy: Communicates with the other ranks.
            trained: Whether the adapter that sampled the images has been trained.

        Raises:
            Diverged: Images are not finite; raised on all ranks.
        """
        if self._any(strategy):
            why = (
                f"Training has diverged. {REMEDY}"
                if trained
                else "The model's numbers are too large for its precision: choose another `model.policy.dtype`."
            )
            raise Diverged(f"Sampled images must be finite. Found others. {why}")
