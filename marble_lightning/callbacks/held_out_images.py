"""The callback that logs held-out images and writes them to files."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.evaluation.evaluator import HeldOut
from marble_lightning.run_folder import run_folder
from marble_lightning.utils.atomic_files import atomic_write
from marble_lightning.utils.distributed import gather_items
from marble_lightning.utils.images import grid, scores_text, to_image
from marble_lightning.utils.loggers import log_image


class HeldOutImages(Callback):
    """Logs a grid of held-out images and writes it as a PNG to the run's folder, with the same prompts and noise each time.

    Args:
        count: Number of images in the grid, evenly spaced over the held-out prompts, >= 1.
    """

    def __init__(self, count: int = 12) -> None:
        if count < 1:
            raise ValueError(f"`held_out_images.count` must be >= 1. Found {count}.")
        self.count = count
        self.shown: dict[int, tuple[Tensor, str]] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: HeldOut, *arguments: Any
    ) -> None:
        total = len(get_datamodule(trainer).held_out)
        wanted = set(torch.linspace(0, total - 1, min(self.count, total)).round().int().tolist())
        names = list(pl_module.reward_models)  # type: ignore[arg-type]
        for (index, prompt), image, scores in zip(batch, outputs["images"], outputs["scores"], strict=True):
            if index in wanted:
                self.shown[index] = (image.cpu(), f"{prompt.text}\n{scores_text(scores, names)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        shown = dict(sorted(gather_items(list(self.shown.items())), key=lambda item: item[0]))
        self.shown = {}
        if not shown or not trainer.is_global_zero:
            return
        sheet = grid([image for image, _ in shown.values()], [text for _, text in shown.values()])
        step = f"_{trainer.global_step:06d}" if trainer.state.fn == "fit" else ""
        with atomic_write(folder / f"held_out{step}.png") as scratch:
            to_image(sheet).save(scratch)
        log_image(trainer, "held_out", sheet, trainer.global_step)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment] # the hooks differ in names of arguments
    on_test_end = on_validation_end
