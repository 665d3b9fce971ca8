"""The command line: `marble-lightning fit|validate|test|predict`, wired by LightningCLI."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from balancers import Balancer
from marble_lightning.alarms import Alarms
from marble_lightning.callbacks import HeldOutTable, Pictures, PictureWriter, ProgressBar
from marble_lightning.harmony import Harmony
from marble_lightning.memory import Memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.prompts import PromptDataModule

QUIET = (
    "Found .* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
    "The dirpath has changed",
)
"""Lightning's warnings about what is meant here: a frozen base, prompts that need no loading, a folder per run."""


def last_checkpoint() -> ModelCheckpoint:
    """Keeps the last finished round in the run's folder, `checkpoints/last.ckpt` pointing to it.

    The next round's file is complete before the one before it goes, so that a kill at any moment loses no more than a round.
    """
    return ModelCheckpoint(
        filename="round_{epoch:04d}",
        auto_insert_metric_name=False,
        save_last="link",
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )


class MarbleCLI(LightningCLI):
    """LightningCLI with the balancer as a part of its own and one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Balancer, "balancer", subclass_mode=True, required=True)
        parser.add_lightning_class_args(Harmony, "harmony")
        parser.add_lightning_class_args(Alarms, "alarms")
        parser.add_lightning_class_args(Memory, "memory")
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
        trainer_defaults={"callbacks": [HeldOutTable(), last_checkpoint()]},
    )
