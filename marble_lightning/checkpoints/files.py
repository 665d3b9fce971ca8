"""Checkpoint files: written whole or not at all, checked before they are loaded, and found again."""

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
    """The newest `last.ckpt` of the trainer's runs of one name, if there is one."""
    root, logger = folder_of_runs(trainer), trainer.logger
    found = [*root.glob(f"*/checkpoints/{LAST}"), *root.glob(f"checkpoints/{LAST}")]  # earlier runs without a logger
    if isinstance(logger, WandbLogger):  # where Lightning keeps checkpoints
        found += Path(logger.save_dir or root).glob(f"{logger.name}/*/checkpoints/{LAST}")
    return max(found, key=time_of, default=None)  # also a link that leads nowhere: loading says so


def point(link: Path, to: Path) -> None:
    """Make a symbolic link lead elsewhere in one step, so that it leads somewhere at any moment."""
    with scratch_for(link) as beside:
        try:
            os.symlink(os.path.relpath(to, link.parent), beside)
        except OSError:  # on Windows a privilege of few
            shutil.copy(to, beside)
        os.replace(beside, link)
    folder_to_disk(link.parent)


def _is_newest(trainer: Trainer, file: Path, link: Path) -> None:
    """Have a run's link, and the SLURM job's if this is one, lead to its newest checkpoint."""
    point(link, file)
    if name := job():
        point(link_of_job(folder_of_runs(trainer), name), file)


class NotWritten(OSError):
    """A checkpoint file could not be written."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, whole on disk before they get their name, and checked before they are loaded.

    Lightning writes to the system's temporary folder and moves the file from there. Between two file systems that is a copy,
    which a kill cuts short under the final name; and nothing makes sure that the disk has it. `DiffusionNFT` uses it unless
    the trainer was given another plugin.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write it as `atomic_write` does; files that are not local are left to Lightning.

        Raises:
            NotWritten: With the file, which is not there or as it was before.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(Path(path)) as beside, beside.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where a stream takes no more
            raise NotWritten(f"The checkpoint {path} must be written to a disk with room for it. Found {error}.") from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint of `fit` from this machine.

        Raises:
            ValueError: It is elsewhere, damaged, incomplete, another program's, or not finite.
        """
        names = ("map_location", "weights_only")
        on_cpu = {"map_location": lambda storage, location: storage}
        return load_checked(path, TO_EVALUATE, **{**on_cpu, **dict(zip(names, arguments, strict=False)), **options})
