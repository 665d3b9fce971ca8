"""Signals that end a run: its processes stop in the same place and leave a checkpoint, and SLURM queues the job again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)


class Asked(IntEnum):
    """What a run was asked for; where processes were asked for different things, the greater counts."""

    NOTHING = 0
    TO_QUEUE_AGAIN = 1
    TO_END = 2


class Stopped(SIGTERMException):
    """Every process of a run raises this at the same place."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked


class Stops(Callback):
    """Ends `fit` on SIGTERM, and on the signal that SLURM sends before a job's time is up, after which it is queued again.

    Lightning's handlers exchange messages with the other processes wherever the signal finds them, where these may wait
    for another message. Ours only take note; the processes agree where they meet anyway, before a batch of pictures is
    sampled, for a round or held-out prompts, and before a micro-batch. The command line adds it; in Python:
    `Trainer(callbacks=[Stops(), ...])`.
    """

    asked = Asked.NOTHING
    held_out_batches = 0
    """Batches of held-out prompts that every process has; one may have another, before which no other would agree."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.asked = Asked.NOTHING

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it sets after `on_fit_start` and takes away in the end."""
        if threading.current_thread() is not threading.main_thread():
            return  # where Python allows no handlers
        signal.signal(signal.SIGTERM, self._take_note(Asked.TO_END))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signal.signal(environment.requeue_signal, self._take_note(Asked.TO_QUEUE_AGAIN))

    on_sanity_check_start = on_train_start

    def _take_note(self, asked: Asked) -> Any:
        def handler(*_: Any) -> None:
            self.asked = max(self.asked, asked)

        return handler

    def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
        self.end_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        own = torch.tensor(float(batches), device=trainer.strategy.root_device)
        self.held_out_batches = int(trainer.strategy.reduce(own, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx < self.held_out_batches and trainer.state.fn == "fit":
            self.end_if_asked(trainer)

    def end_if_asked(self, trainer: Trainer) -> None:
        """To be called by every process, or by none.

        Raises:
            Stopped: Any process was asked to end; on all of them.
        """
        asked = self.asked
        if trainer.world_size > 1:
            own = torch.tensor(float(asked), device=trainer.strategy.root_device)
            asked = Asked(int(trainer.strategy.reduce(own, reduce_op="max")))
        if asked:
            raise Stopped(asked)


def end_if_asked(trainer: Trainer) -> None:
    """Ask the trainer's `Stops`, if it has one. To be called by every process, or by none.

    Raises:
        Stopped: As `Stops.end_if_asked`.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Stops):
            callback.end_if_asked(trainer)


def status(end: SIGTERMException) -> int:
    """The exit status of a process that was ended, once SLURM has been told to queue the job again if it is to be.

    That of a process killed by SIGTERM, so that whoever started the run does not take it for a finished one. Only the
    first process says so: launchers kill the others where one of them fails.
    """
    if getattr(rank_zero_only, "rank", 0):
        return 0
    if isinstance(end, Stopped) and end.asked is Asked.TO_QUEUE_AGAIN:
        _queue_again()
    return 128 + signal.SIGTERM


def job() -> str | None:
    """The SLURM job that this process is part of, as `scontrol` knows it; it keeps its name when it is queued again."""
    if not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def left_by_this_job(folder: Path) -> Path | None:
    """The checkpoint that a SLURM job, which has been queued again, goes on from; None before there is one.

    Args:
        folder: That of the runs of one name.
    """
    name = job()
    if name is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    link = link_of_job(folder, name)
    return link.resolve() if link.exists() else None


def link_of_job(folder: Path, name: str) -> Path:
    """The link that leads to a job's newest checkpoint."""
    return folder / f"slurm_{name}.ckpt"


def _queue_again() -> None:
    command = ["scontrol", "requeue", str(job())]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning(f"`{' '.join(command)}` failed: {said}. Submit the job again with --ckpt_path last.")
    else:
        log.warning(f"SLURM has queued job {job()} again; it goes on from this checkpoint.")
