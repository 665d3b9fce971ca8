"""Checkpoint files: atomic writing, checked loading, and links to the newest one."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from marble_lightning.checkpoints.content import LAST, TO_EVALUATE, load_checked, time_of
from marble_lightning.checkpoints.signals import job, link_of_job
from marble_lightning.run_folder import folder_of_runs
from marble_lightning.utils.atomic_files import atomic_write, folder_to_disk, scratch_for

log = logging.getLogger(__name__)


warn = rank_zero_only(log.warning)


def last_of(trainer: Trainer) -> Path | None:
    """The newest `last.ckpt` of the trainer's runs of one name; None if there is none."""
    root, logger = folder_of_runs(trainer), trainer.logger
    files = [*root.glob(f"*/checkpoints/{LAST}"), *root.glob(f"checkpoints/{LAST}")]  # the second: runs without a logger
    if isinstance(logger, WandbLogger):  # the folder where Lightning writes checkpoints
        files += Path(logger.save_dir or root).glob(f"{logger.name}/*/checkpoints/{LAST}")
    return max(files, key=time_of, default=None)  # may be a broken link, which fails on loading


def point(link: Path, to: Path) -> None:
    """Replace a symbolic link atomically, so that it has a target at any moment."""
    with scratch_for(link) as scratch:
        try:
            os.symlink(os.path.relpath(to, link.parent), scratch)
        except OSError:  # Windows allows links to privileged users only
            shutil.copy(to, scratch)
        os.replace(scratch, link)
    folder_to_disk(link.parent)


def _link_newest(trainer: Trainer, file: Path, link: Path) -> None:
    """Link a run's `last.ckpt`, and the link of the SLURM job if there is one, to the newest checkpoint."""
    point(link, file)
    if name := job():
        point(link_of_job(folder_of_runs(trainer), name), file)


class NotWritten(OSError):
    """A checkpoint file could not be written."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoint files atomically, and checks them before they are loaded.

    Lightning writes to the system's temporary folder and moves the file from there. Between two file systems, a move is a
    copy, and a kill leaves a partial file under the final name. Lightning does not flush the file to disk either.
    `DiffusionNFT` uses this plugin unless the trainer was given another one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a local file with `atomic_write`, and any other as Lightning does.

        Raises:
            NotWritten: The file could not be written; an earlier file of that name is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(Path(path)) as scratch, scratch.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a stream is full
            raise NotWritten(f"The checkpoint {path} must be written to a disk with room for it. Found {error}.") from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint of `fit` from this machine.

        Raises:
            ValueError: The file is remote, damaged, incomplete, not finite, or from another program.
        """
        names = ("map_location", "weights_only")
        on_cpu = {"map_location": lambda storage, location: storage}
        return load_checked(path, TO_EVALUATE, **{**on_cpu, **dict(zip(names, arguments, strict=False)), **options})


def use_whole_files(trainer: Trainer) -> None:
    """Make a trainer write checkpoints by `WholeCheckpointIO`, unless the user gave it another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
