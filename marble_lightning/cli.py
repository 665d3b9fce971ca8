"""The command line: `marble-lightning fit|validate|test|predict`, wired by LightningCLI."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from balancers import Balancer
from marble_lightning.alarms import Alarms
from marble_lightning.callbacks import HeldOutTable, Pictures, PictureWriter, ProgressBar
from marble_lightning.checkpoints import LAST, RoundCheckpoint, WholeCheckpointIO, last_of, warn
from marble_lightning.harmony import Harmony
from marble_lightning.module import DiffusionNFT
from marble_lightning.prompts import PromptDataModule

QUIET = (
    "Found .* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
    "The dirpath has changed",
)
"""Lightning's warnings about what is meant here: a frozen base, prompts that need no loading, a folder per run."""


class MarbleCLI(LightningCLI):
    """LightningCLI with the balancer as a part of its own and one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Balancer, "balancer", subclass_mode=True, required=True)
        parser.add_lightning_class_args(Harmony, "harmony")
        parser.add_lightning_class_args(Alarms, "alarms")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoints")
        parser.add_lightning_class_args(Pictures, "pictures")
        parser.add_lightning_class_args(PictureWriter, "predictions")
        parser.link_arguments("seed_everything", "model.seed")

    def before_instantiate_classes(self) -> None:
        """Add our progress bar, unless bars are switched off; HeldOutTable takes the place of Lightning's table."""
        options = self.config[self.subcommand] if self.subcommand else self.config
        if options.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(ProgressBar())
        if "verbose" in options:
            options.verbose = False

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Have checkpoints written whole, unless a plugin of the user's writes them."""
        trainer = super().instantiate_trainer(**options)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Let `--ckpt_path last` mean the last run of the logger's name; Lightning looks in the new run's empty folder."""
        options = self.config_init[self.subcommand]
        if options.ckpt_path != "last":
            return
        folder, found = last_of(self.trainer)
        if found is None and self.subcommand != "fit":
            raise ValueError(f"`ckpt_path` must be a checkpoint. Found `last`, and no run in {folder} has a {LAST}.")
        if found is None:
            warn(f"`--ckpt_path last`: no run in {folder} has a {LAST} yet, so this one begins with the first round.")
        options.ckpt_path = None if found is None else str(found)

    before_validate = before_test = before_predict = before_fit


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` replaces `sys.argv` where given."""
    for known in QUIET:
        warnings.filterwarnings("ignore", known)
    MarbleCLI(
        DiffusionNFT,
        PromptDataModule,
        args=list(args) if args is not None else None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        trainer_defaults={"callbacks": [HeldOutTable()]},
    )
