"""Signals that end a run: its processes stop in the same place and leave a checkpoint, and SLURM queues the job again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from marble_lightning.utils.distributed import OnAllRanks

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)


MICRO_BATCHES = 8
"""Most micro-batches between two agreements of several processes; few seconds of a full-size model, of which a cluster
gives at least 30 from SIGTERM to SIGKILL."""

ENDS = 1000
"""Added to the number of a signal that ends a run, so that it counts more than one after which SLURM queues it again."""


class Stopped(OnAllRanks, SIGTERMException):
    """Every process of a run raises this at the same place.

    Args:
        asked: The signal's number, and `ENDS` where it ends the run for good.
    """

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.signal, self.queue_again = asked % ENDS, asked < ENDS


class Stops(Callback):
    """Ends a run on SIGTERM, SIGHUP or Ctrl-C, and on the signal that SLURM sends before a job's time is up.

    Lightning's handlers exchange messages with the other processes wherever the signal finds them, where these may wait
    for another message; Ctrl-C raises an exception wherever it finds a process, also where a library holds a lock. Ours
    only take note; the processes agree where they meet anyway: before a batch of images is sampled, for a round or
    held-out prompts, and before every `MICRO_BATCHES`-th micro-batch of an optimizer step at the latest, as an agreement
    makes a device wait for its host. A single process looks before every one. After SLURM's signal the job is queued again.
    A second Ctrl-C ends the process at once, whatever it does. A signal that is ignored, as `nohup` and a shell's
    background have it, stays so. The command line adds it; in Python: `Trainer(callbacks=[Stops(), ...])`.
    """

    asked = 0
    """0, or what the run was asked for, as `Stopped` takes it."""
    held_out_batches = 0
    """Batches of held-out prompts that every process has; one may have another, before which no other would agree."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.asked = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it sets after `on_fit_start` and takes away in the end."""
        if threading.current_thread() is not threading.main_thread():
            return  # where Python allows no handlers
        signal.signal(signal.SIGTERM, self._ask(ENDS))
        for name in ("SIGINT", "SIGHUP"):  # there is no SIGHUP on Windows
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask(ENDS))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            fits = trainer.state.fn == "fit"  # of all else nothing is kept: queued again, it would never come further
            signal.signal(environment.requeue_signal, self._ask(0 if fits else ENDS))

    on_sanity_check_start = on_train_start

    def _ask(self, how: int) -> Any:
        def handler(number: int, _: Any) -> None:
            self.asked = max(self.asked, number + how)
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # which also ends a process that waits for another one
                with suppress(OSError):  # neither print nor logging may be called within a call of its own, as here
                    os.write(
                        2, b"\nCtrl-C: the run ends in good order, which may take some seconds. Again ends it at once.\n"
                    )

        return handler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % agreement_every(trainer) == 0:
            self.end_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_predict_batches)

    def _evaluate(self, trainer: Trainer, batches: Sequence[int | float]) -> None:
        if trainer.state.fn != "fit":
            self.on_train_start(trainer, trainer.lightning_module)
        own = torch.tensor(float(sum(batches)), device=trainer.strategy.root_device)
        self.held_out_batches = int(trainer.strategy.reduce(own, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx < self.held_out_batches:
            self.end_if_asked(trainer)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def end_if_asked(self, trainer: Trainer) -> None:
        """To be called by every process, or by none.

        Raises:
            Stopped: Any process was asked to end; on all of them.
        """
        asked = self.asked
        if trainer.world_size > 1:
            own = torch.tensor(float(asked), device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(own, reduce_op="max"))
        if asked:
            raise Stopped(asked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and trainer.state.fn != "fit":
            warn(f"Stopped by {signal.Signals(exception.signal).name} before the end: no scores were written.")


def agreement_every(trainer: Trainer) -> int:
    """Micro-batches from one agreement on a stop to the next, the same on all processes."""
    return 1 if trainer.world_size == 1 else min(MICRO_BATCHES, trainer.accumulate_grad_batches)


def is_asked(trainer: Trainer) -> bool:
    """Whether this process was asked to stop, of which others may not know yet."""
    return any(isinstance(callback, Stops) and callback.asked for callback in trainer.callbacks)  # type: ignore[attr-defined]


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

    That of a process killed by the signal, so that whoever started the run does not take it for a finished one. Only the
    first process says so: launchers kill the others where one of them fails.
    """
    if getattr(rank_zero_only, "rank", 0):
        return 0
    if not isinstance(end, Stopped):
        return 128 + signal.SIGTERM
    if end.queue_again:
        _queue_again()
    return 128 + end.signal


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
