"""The optimizer: the published settings, checks of other optimizers, and clipping."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with the published settings."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)


def check_optimizer(optimizer: Optimizer, scheduler: object, scaler: GradScaler | None) -> None:
    """Check that a merged gradient can be written before the step, and that the schedule counts optimizer steps.

    Raises:
        ValueError: The optimizer is fused while a loss scaler is in use, or the scheduler is ReduceLROnPlateau.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "`optimizer` must not be a fused one with `precision` 16-mixed: it undoes the loss scaling within its step, but "
            "a merged gradient must be written after the unscaling and before the update. Found a fused "
            f"{type(optimizer).__name__}; use bf16-mixed, or `fused: false`."
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "`lr_scheduler` must be one that goes by optimizer steps. Found ReduceLROnPlateau, which goes by a metric."
        )


def with_schedule(optimizer: Optimizer, schedule: Any, scaler: GradScaler | None) -> dict[str, Any]:
    """An optimizer and its learning rate's schedule by optimizer steps, as Lightning takes them.

    Args:
        optimizer: The optimizer.
        schedule: Makes the schedule of an optimizer; None for none.
        scaler: The loss scaler, or None.

    Raises:
        ValueError: As `check_optimizer`.
    """
    scheduler = schedule(optimizer) if schedule else None
    check_optimizer(optimizer, scheduler, scaler)
    per_step = {"lr_scheduler": {"scheduler": scheduler, "interval": "step"}} if scheduler else {}
    return {"optimizer": optimizer, **per_step}


def clip_unscaled(plugin: Precision, optimizer: Optimizer, value: float | None, algorithm: Any = None) -> None:
    """Clip unscaled gradients, also those of fused optimizers, which Lightning refuses to clip under autocast."""
    if value:
        Precision.clip_gradients(plugin, optimizer, value, algorithm or GradClipAlgorithmType.NORM)
