"""Logging of metrics and images to every logger of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor

from marble_lightning.utils.images import to_image


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics to every logger at one step only; `LightningModule.log` would repeat them at later steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def log_image(trainer: Trainer, name: str, image: Float[Tensor, "3 height width"], step: int) -> None:
    """Log an image to every logger that shows images: TensorBoard, W&B, MLflow and loggers with the same methods.

    Call it on the first process only.

    Args:
        trainer: The trainer with the loggers.
        name: Name of the image in the logger.
        image: Image in [0, 1].
        step: Optimizer step.
    """
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(key=name, images=[to_image(image)], step=step)
        elif hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(name, image, step)
        elif hasattr(logger, "run_id") and hasattr(experiment, "log_image"):  # MLflow; its client needs the run's id
            experiment.log_image(logger.run_id, to_image(image), key=name, step=step)
