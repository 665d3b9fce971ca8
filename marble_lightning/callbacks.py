"""What a run shows: progress, pictures, the balancer's diagnostics, and a table at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor

from marble_lightning.held_out import HeldOut
from marble_lightning.module import DiffusionNFT
from marble_lightning.pictures import grid, scores_text, to_image
from marble_lightning.table import held_out_table, tags_table


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, with the words of this method: the sanity check measures the base, an epoch is a round."""

    @property
    def sanity_check_description(self) -> str:
        return "Base on held-out prompts"

    @property
    def validation_description(self) -> str:
        return "Held-out prompts"

    def on_train_epoch_start(self, trainer: Trainer, *arguments: Any) -> None:
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(f"Round {trainer.current_epoch}: training")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class Pictures(Callback):
    """Held-out pictures in TensorBoard after every validation, the same prompts and noise each time.

    Args:
        count: Pictures in the grid, spread over the held-out prompts, >= 1.
    """

    def __init__(self, count: int = 12) -> None:
        if count < 1:
            raise ValueError(f"`count` must be >= 1. Found {count}.")
        self.count = count
        self.shown: dict[int, tuple[Tensor, str]] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: HeldOut, *arguments: Any
    ) -> None:
        total = len(trainer.datamodule.held_out)  # type: ignore[attr-defined]
        wanted = set(torch.linspace(0, total - 1, min(self.count, total)).round().int().tolist())
        names = list(pl_module.judges)  # type: ignore[arg-type]
        for (index, prompt), image, scores in zip(batch, outputs["images"], outputs["scores"], strict=True):
            if index in wanted:
                self.shown[index] = (image.cpu(), f"{prompt.text}\n{scores_text(scores, names)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = [self.shown[index] for index in sorted(self.shown)]
        self.shown = {}
        if shown and isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            sheet = grid([image for image, _ in shown], [text for _, text in shown])
            trainer.logger.experiment.add_image("held_out", sheet, trainer.global_step)


class HeldOutTable(Callback):
    """Prints base -> trained on held-out prompts when a run ends, where it is, and what to do next.

    The scores themselves, one row per held-out picture, are kept in the run's folder as `held_out.pt`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        every = trainer.check_val_every_n_epoch
        if stage == "fit" and trainer.limit_val_batches and every and trainer.max_epochs and trainer.max_epochs % every:
            raise ValueError(
                f"`max_epochs` must be a multiple of `check_val_every_n_epoch`, {every}, for the last round to be judged. "
                f"Found {trainer.max_epochs}."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or ".")  # asked on every rank: it is a broadcast
        if not trainer.is_global_zero:
            return
        self._show(trainer, pl_module)
        if isinstance(pl_module, DiffusionNFT) and pl_module.trained_scores is not None:
            kept = {"judges": list(pl_module.judges), "base": pl_module.base_scores, "trained": pl_module.trained_scores}
            torch.save(kept, folder / "held_out.pt")
        config, checkpoint = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
        print(
            f"\nThis run:       {folder}\n"
            f"Judge it again: marble-lightning validate -c {config} --ckpt_path {checkpoint}\n"
            f"See it:         tensorboard --logdir {folder.parent}\n"
            f"The plain sum:  marble-lightning fit -c {config} -c configs/balancers/weighted_sum.yaml --ckpt_path null"
        )

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module)

    @staticmethod
    def _show(trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, DiffusionNFT) or module.trained_scores is None:
            return
        console, scores = Console(width=110), module.trained_scores
        alone = trainer.state.fn != "fit" and not trainer.ckpt_path  # what was judged is the base itself
        heading, base = ("base", None) if alone else ("trained", module.base_scores)
        console.print(held_out_table(list(module.judges), scores, heading=heading, base=base))
        if tags := module.by_tag(scores):
            console.print(tags_table(tags, heading=heading, base=None if base is None else module.by_tag(base)))
        if base is None and not alone:
            console.print("No base beside it: it was not measured on these prompts (`num_sanity_val_steps: -1` does).")


class PictureWriter(BasePredictionWriter):
    """Writes the pictures of `predict` as PNG files, and their prompts and scores as one JSONL file beside them.

    Args:
        folder: Where to; null is `predictions` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__("batch")
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: HeldOut,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = Path(self.folder or Path(trainer.log_dir or ".") / "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        names = list(pl_module.judges)  # type: ignore[arg-type]
        with (folder / f"pictures-{trainer.global_rank}.jsonl").open("w" if batch_idx == 0 else "a") as lines:
            for (index, prompt), image, scores in zip(batch, prediction["images"], prediction["scores"], strict=True):
                file = folder / f"{index:05d}.png"
                to_image(image).save(file)
                there = {name: score for name, score in zip(names, scores.tolist(), strict=True) if score == score}
                record = {"file": file.name, "prompt": prompt.text, "source": prompt.source, "scores": there}
                lines.write(json.dumps(record) + "\n")
