"""Logging of metrics, images and tables to every logger of a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
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


def log_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Log a table to every logger that shows tables: W&B, TensorBoard as text, MLflow as a CSV file `{name}.csv`.

    Call it on the first process only.

    Args:
        trainer: The trainer with the loggers.
        name: Name of the table in the logger.
        columns: Headings.
        rows: Rows with an entry for each column; None for no entry.
        step: Optimizer step.
    """
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_table"):  # W&B
            logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif hasattr(experiment, "add_text"):  # TensorBoard, which shows Markdown
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
            experiment.add_text(name, text, step)
        elif hasattr(logger, "run_id") and hasattr(experiment, "log_text"):  # MLflow; its tables would need pandas
            file = io.StringIO(newline="")
            csv.writer(file).writerows([columns, *rows])
            experiment.log_text(logger.run_id, file.getvalue(), f"{name}.csv")
