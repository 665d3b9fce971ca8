"""Signals that end a run: all processes stop at the same point and write a checkpoint, and SLURM requeues the job."""

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

from marble_lightning.utils.distributed import OnAllRanks, wait_for_ranks

log = logging.getLogger(__name__)
warn = rank_zero_only(log.warning)


MICRO_BATCHES = 8
"""At most this many micro-batches pass before several processes check for a stop together; with a full-size model that is
a few seconds. Clusters allow at least 30 seconds from SIGTERM to SIGKILL."""

ENDS = 1000
"""Added to the number of a signal that ends the run for good, so that it takes precedence over SLURM's requeue signal."""


class Stopped(OnAllRanks, SIGTERMException):
    """Every process of a run raises this at the same point.

    Args:
        requested: The signal's number, plus `ENDS` if it ends the run for good.
    """

    def __init__(self, requested: int) -> None:
        super().__init__()
        self.signal, self.requeue = requested % ENDS, requested < ENDS


class Stops(Callback):
    """Ends a run on SIGTERM, SIGHUP or Ctrl-C, and on the signal that SLURM sends before a job's time is up.

    Lightning's handlers exchange messages with the other processes as soon as the signal arrives, while these may wait for
    another message. Ctrl-C raises an exception at an arbitrary point, even while a library holds a lock. The handlers of
    this callback only record the signal. The processes then check for a stop together at fixed points: before a batch of
    images is sampled, for a round or for held-out prompts, and before at least every `MICRO_BATCHES`-th micro-batch of an
    optimizer step. They do not check more often, because a check makes the device wait for its host. A single process
    checks before every micro-batch.

    After SLURM's signal the job is queued again. A second Ctrl-C ends the process at once. An ignored signal stays ignored,
    as under `nohup` or for a background process of a shell. The command line adds this callback; in Python use
    `Trainer(callbacks=[Stops(), ...])`.
    """

    requested = 0
    """0, or the requested stop as in the argument of `Stopped`."""
    held_out_batches = 0
    """Number of batches of held-out prompts that every process has; a process with one more must not check before it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.requested = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which it sets after `on_fit_start` and removes at the end."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers in the main thread only
        signal.signal(signal.SIGTERM, self._handler(ENDS))
        for name in ("SIGINT", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handler(ENDS))
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            fits = trainer.state.fn == "fit"  # other commands cannot resume: requeued, they would never finish
            signal.signal(environment.requeue_signal, self._handler(0 if fits else ENDS))

    on_sanity_check_start = on_train_start

    def _handler(self, offset: int) -> Any:
        def handler(number: int, _: Any) -> None:
            self.requested = max(self.requested, number + offset)
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # this also ends a process that waits for another one
                with suppress(OSError):  # the handler may interrupt print or logging, which are not reentrant
                    os.write(2, b"\nCtrl-C: the run stops cleanly, which may take some seconds. Again ends it at once.\n")

        return handler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % agreement_every(trainer) == 0:
            self.stop_if_requested(trainer, f"micro-batches of round {trainer.current_epoch}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, trainer.num_predict_batches)

    def _evaluate(self, trainer: Trainer, batches: Sequence[int | float]) -> None:
        if trainer.state.fn != "fit":
            self.on_train_start(trainer, trainer.lightning_module)
        number = torch.tensor(float(sum(batches)), device=trainer.strategy.root_device)
        self.held_out_batches = int(trainer.strategy.reduce(number, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx < self.held_out_batches:
            self.stop_if_requested(trainer, f"batch {batch_idx} of the held-out prompts")

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def stop_if_requested(self, trainer: Trainer, action: str) -> None:
        """Stop if any process was asked to. Every process must call this, or none.

        Args:
            trainer: The trainer.
            action: What the processes do before this, for messages about one that is late.

        Raises:
            Stopped: A signal asked any process to stop; on all of them.
            TimeoutError: Another process is too late, see `wait_for_ranks`.
        """
        requested = self.requested
        if trainer.world_size > 1:
            wait_for_ranks(trainer.strategy, action)
            of_rank = torch.tensor(float(requested), device=trainer.strategy.root_device)
            requested = int(trainer.strategy.reduce(of_rank, reduce_op="max"))
        if requested:
            raise Stopped(requested)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped) and trainer.state.fn != "fit":
            warn(f"Stopped by {signal.Signals(exception.signal).name} before the end: no scores were written.")


def agreement_every(trainer: Trainer) -> int:
    """Micro-batches from one common check for a stop to the next, the same on all processes."""
    return 1 if trainer.world_size == 1 else min(MICRO_BATCHES, trainer.accumulate_grad_batches)


def stop_requested(trainer: Trainer) -> bool:
    """Whether a signal asked this process to stop; other processes may not know it yet."""
    return any(isinstance(callback, Stops) and callback.requested for callback in trainer.callbacks)  # type: ignore[attr-defined]


def stop_if_requested(trainer: Trainer, action: str) -> None:
    """Call `stop_if_requested` of the trainer's `Stops`, if it has one, with the same arguments and errors."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Stops):
            callback.stop_if_requested(trainer, action)


def status(end: SIGTERMException) -> int:
    """Requeue the SLURM job if the signal says so, and return the exit status of the stopped process.

    The status is that of a process killed by the signal, so that a caller does not take the run for a finished one. Only the
    first process returns it; the others return 0, because a launcher kills all processes when one of them fails.
    """
    if getattr(rank_zero_only, "rank", 0):
        return 0
    if not isinstance(end, Stopped):
        return 128 + signal.SIGTERM
    if end.requeue:
        _requeue()
    return 128 + end.signal


def job() -> str | None:
    """The id of this process's SLURM job as `scontrol` takes it, None outside SLURM; a requeued job keeps its id."""
    if not SLURMEnvironment.detect():
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def checkpoint_of_job(folder: Path) -> Path | None:
    """The checkpoint that a requeued SLURM job resumes from; None if there is none yet.

    Args:
        folder: Folder of the runs of one name.
    """
    name = job()
    if name is None or not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return None
    link = link_of_job(folder, name)
    return link.resolve() if link.exists() else None


def link_of_job(folder: Path, name: str) -> Path:
    """The path of the link to a job's newest checkpoint."""
    return folder / f"slurm_{name}.ckpt"


def _requeue() -> None:
    command = ["scontrol", "requeue", str(job())]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", None) or error
        log.warning(f"`{' '.join(command)}` failed: {message}. Submit the job again with --ckpt_path last.")
    else:
        log.warning(f"SLURM has queued job {job()} again; it resumes from this checkpoint.")
