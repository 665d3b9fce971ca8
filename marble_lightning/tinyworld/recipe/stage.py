"""The base class of stages: a Lightning loop over a fixed number of steps, with warm-up, decay, averaging and resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset


class Draws(IterableDataset[Tensor]):
    """Batch indices for each step. They depend only on the step, so that a stage can resume."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.stage.global_step, self.stage.steps):
            yield torch.randint(self.stage.examples, (self.stage.batch_size,), generator=self.stage.draws(step))


class Stage(LightningModule):
    """One stage of the recipe.

    Args:
        model: The model to train; `averaged` holds the exponential moving average of its weights.
        examples: Number of training examples; `training_step` receives indices into them.
        steps: Optimizer steps.
        batch_size: Examples per step.
        lr: Peak learning rate, after a warm-up over the first 5% and with a cosine decay.
        decay: Decay per step of the moving average.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        examples: int,
        steps: int,
        batch_size: int,
        lr: float,
        decay: float = 0.998,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.examples, self.steps, self.batch_size, self.lr = examples, steps, batch_size, lr

    def draws(self, step: int) -> torch.Generator:
        """Return the random generator for the batch of a step."""
        return torch.Generator().manual_seed(7919 * step + 1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Draws(self), batch_size=None)

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        self.averaged.update_parameters(self.model)

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer; its learning rates are the peak ones."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        warm_up = max(1, self.steps // 20)

        def factor(step: int) -> float:
            return min((step + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(stage: Stage, folder: Path) -> Any:
    """Train a stage, resuming from its last checkpoint if there is one, and return the averaged model."""
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=200, save_top_k=1, filename="stage")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=stage.steps,
        logger=CSVLogger(folder),
        callbacks=[checkpoint, TQDMProgressBar(refresh_rate=20)],
        gradient_clip_val=1.0,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    last = folder / "last.ckpt"
    trainer.fit(stage, ckpt_path=last if last.exists() else None)
    return stage.averaged.module.eval()
