"""The folder of a run: configuration, checkpoints, results and images of exactly one command."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from marble_lightning.utils.run_files import CONFIG, RESULTS


def folder_of_runs(trainer: Trainer) -> Path:
    """The folder with all runs of one name; it is the same on every process, even before a logger has started.

    It is `save_dir/name` of a logger with a folder for each version (TensorBoard, CSV), and `default_root_dir` for other
    loggers, such as W&B and MLflow, and without a logger.
    """
    logger = trainer.logger
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.save_dir) / (logger.name or "")
    return Path(trainer.default_root_dir)


def run_folder(trainer: Trainer) -> Path:
    """The folder of a run's files: that of `RunFolder` once it is set up, or Lightning's. Every process must call this."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolder):
            return callback.folder
    return Path(trainer.log_dir or trainer.default_root_dir)


class RunFolder(Callback):
    """Creates a new folder for every run, and writes the complete configuration to it.

    A run uses the logger's version folder if no earlier run has used it. Otherwise, for example with `version: mine`, it
    uses the next free one of `mine_1`, `mine_2` and so on. With loggers without version folders, and without a logger, it
    uses `version_0`, `version_1` and so on in `trainer.default_root_dir`.

    Args:
        config: The configuration as YAML. It may contain API keys, so only its owner can read the file.
    """

    def __init__(self, config: str) -> None:
        self.config = config
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder on the first process, and set it as the folder of checkpoints."""
        chosen = claim(candidates(trainer), self.config) if trainer.is_global_zero else Path()
        self.folder = trainer.strategy.broadcast(chosen)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")


def candidates(trainer: Trainer) -> Iterator[Path]:
    """Folders that a run may use, in order of preference."""
    root, logger = folder_of_runs(trainer), trainer.logger
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return chain([root / version], (root / f"{version}_{index}" for index in count(1)))
    taken = [int(match[1]) for folder in root.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", folder.name))]
    return (root / f"version_{index}" for index in count(max(taken, default=-1) + 1))


def claim(folders: Iterator[Path], config: str) -> Path:
    """Claim the first folder that no other run has used, by writing the configuration to it.

    Args:
        folders: An infinite iterator of candidates.
        config: Content of the configuration file.
    """
    for folder in folders:
        if (folder / "checkpoints").exists() or (folder / RESULTS).exists():  # used by a run that was started in Python
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:  # an atomic operation, since another run may have begun at the same time
            handle = os.open(folder / CONFIG, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode=0o600)
        except FileExistsError:
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(config)
        return folder
    raise AssertionError("`folders` must not end.")
