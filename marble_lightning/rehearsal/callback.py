"""The callback that measures a rehearsal, and prints what the run will take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from marble_lightning.callbacks.gradient_alignment import GradientAlignment
from marble_lightning.callbacks.results_writer import Results
from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.checkpoints.content import LAST, TO_FIT, load_checked
from marble_lightning.memory.report import gib
from marble_lightning.module import DiffusionNFT
from marble_lightning.rehearsal.duration import Times, phases
from marble_lightning.rehearsal.sizes import ROUNDS, RunSizes, run_sizes, shrink
from marble_lightning.utils.peak_memory import peak_memory


def begin_rehearsal(settings: Namespace, until_end: ExitStack) -> Rehearsal | None:
    """Turn a run with `trainer.fast_dev_run` into a rehearsal; None for other runs.

    Lightning's own meaning, a few batches without loggers and checkpoints, would train on a part of a round. Instead loggers
    are replaced by the default one, and all files go to a temporary folder.

    Args:
        settings: The settings of `fit`, which are changed.
        until_end: Removes the folder.

    Raises:
        ValueError: `fast_dev_run` is a number above 1, or there is a checkpoint to resume from.
    """
    trainer = settings.trainer
    if not trainer.fast_dev_run:
        return None
    if trainer.fast_dev_run != 1:
        raise ValueError(
            f"`trainer.fast_dev_run` must be true or false: a rehearsal has {ROUNDS} rounds. Found {trainer.fast_dev_run}."
        )
    if settings.ckpt_path:
        raise ValueError(
            f"`ckpt_path` must be null for a rehearsal (`trainer.fast_dev_run`), which begins with the first round. "
            f"Found {settings.ckpt_path}."
        )
    folder = until_end.enter_context(TemporaryDirectory(prefix="rehearsal_"))
    trainer.fast_dev_run, trainer.logger, trainer.default_root_dir = False, True, folder
    return Rehearsal(Path(folder))


def without_first(seconds: Sequence[float]) -> float:
    """The mean without the first, which includes warming up, or that one where there is no other; 0 for none."""
    return fmean(seconds[1:] or seconds) if seconds else 0.0


class Rehearsal(Callback):
    """Makes a run small, measures its phases, reads its checkpoint back, and prints a table.

    Args:
        folder: Temporary folder of all files that the run writes.
    """

    sizes: RunSizes

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun = folder, time.perf_counter()
        self.loading = self.saving = self.held_out = 0.0
        self.micro_batches: dict[tuple[bool, bool], list[float]] = defaultdict(list)
        """Seconds of micro-batches, by whether they have per-reward gradients and a KL term."""
        self.scoring: dict[str, float] = {}
        """Seconds of each reward and metric for an image."""

    def prepare(self, trainer: Trainer, module: DiffusionNFT) -> None:
        """Keep the run's sizes and make it small, after the checks of its settings."""
        self.sizes = run_sizes(trainer, module)
        shrink(trainer, module, self.folder)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            print(f"A rehearsal: {ROUNDS} small rounds. All files go to {self.folder}, which is removed at the end.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loading = self._since(trainer, self.begun)

    # Measuring ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _since(trainer: Trainer, begun: float) -> float:
        """Seconds since a time, after all work of a GPU."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)
        return time.perf_counter() - begun

    def _mark(self, trainer: Trainer) -> None:
        self.marked = self._since(trainer, 0.0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch:
            self.saving = self._since(trainer, self.marked)  # since the end of the round before

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            metrics, images = pl_module.round_metrics, len(pl_module.rollout.groups)
            self.encoding = metrics["time/encoding"]
            self.sampling = (metrics["time/sampling"] - self.encoding) / images
            self.scoring |= {name: metrics[f"time/scoring/{name}"] / images for name in pl_module.rewards}
            self.waiting = metrics["time/waiting_for_scores"] / images
            self._mark(trainer)
        self.with_kl = pl_module.objective.has_kl(trainer.global_step, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        balancer, per_step = pl_module.balancer, pl_module.plan.per_step
        refresh = balancer.solved or balancer.wants_gradients
        solving = refresh and batch_idx % per_step < balancer.options.estimated(per_step)
        self.micro_batches[solving, self.with_kl].append(self._since(trainer, self.marked))
        self._mark(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = 0
        self.validation_begun = self._since(trainer, 0.0)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *arguments: Any) -> None:
        self.images += len(batch)
        seconds = {name: seconds / len(batch) for name, seconds in pl_module.scorer.seconds.items()}
        self.scoring |= {name: seconds[name] for name in pl_module.metrics}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held_out = self._since(trainer, self.validation_begun) / self.images

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the last words of the callbacks that print what a run has learned."""
        kept = [callback for callback in trainer.callbacks if not isinstance(callback, Results | GradientAlignment)]  # type: ignore[attr-defined]
        trainer.callbacks = kept  # type: ignore[attr-defined]

    # Reporting ------------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, DiffusionNFT):
            Console(width=110).print(self._table(pl_module, read_back(trainer, pl_module)))

    def _micro_batch(self, solving: bool, kl_every: int) -> float:
        """Mean seconds of micro-batches of one kind, of which one in `kl_every` has a KL term; 0 if there were none."""
        without, with_kl = (without_first(self.micro_batches[solving, kl]) for kl in (False, True))
        return (with_kl or without) / kl_every + (without or with_kl) * (1 - 1 / kl_every)

    def _times(self, module: DiffusionNFT) -> Times:
        plain, solving = (self._micro_batch(kind, module.objective.kl_every) for kind in (False, True))
        scoring = max(self.scoring[name] for name in module.rewards) if self.sizes.overlap else self.waiting
        return Times(
            loading=self.loading,
            encoding=self.encoding,
            sampling=self.sampling,
            scoring=scoring,
            plain=plain or solving,
            solving=solving or plain,
            held_out=self.held_out,
            saving=self.saving,
        )

    def _table(self, module: DiffusionNFT, reading: float) -> Table:
        sizes, times = self.sizes, self._times(module)
        seconds = phases(sizes, times, module.balancer)
        measured = {
            "loading": ("loading", f"{times.loading:.1f} s"),
            "encoding": ("encoding prompts", f"{times.encoding:.3g} s a round"),
            "sampling": ("sampling", f"{1 / times.sampling:.3g} images a second"),
            "scoring": ("scoring by all rewards", f"{times.scoring:.3g} s an image"),
            "plain": ("training", f"{times.plain:.3g} s a micro-batch"),
            "solving": ("training with per-reward gradients", f"{times.solving:.3g} s a micro-batch"),
            "held_out": ("held-out prompts", f"{times.held_out:.3g} s an image"),
            "saving": ("checkpoints", f"{times.saving:.3g} s to write, {reading:.3g} s to read back"),
        }
        title = f"Rehearsal, and an estimate of the hours of {sizes.rounds} round(s)"
        table = Table(title=title, caption=self._caption(module), caption_justify="left")
        table.add_column("phase", no_wrap=True)
        table.add_column("measured on one process", justify="right", no_wrap=True)
        table.add_column("hours", justify="right", no_wrap=True)
        for name, (phase, text) in measured.items():
            table.add_row(phase, text, f"{seconds[name] / 3600:.3f}")
        table.add_row("the whole run, an estimate", "", f"{sum(seconds.values()) / 3600:.3f}", style="bold")
        table.add_section()
        for name in module.reward_models:
            if name in self.scoring:  # metrics score held-out prompts only
                table.add_row(name, f"{self.scoring[name]:.3g} s an image", "")
        peak = peak_memory(module.device)
        table.add_row(f"peak memory of the {peak['of']}", gib(peak["gib"] * 2**30), "")
        return table

    def _caption(self, module: DiffusionNFT) -> str:
        """What the peak of memory leaves out: images and latents of the run's larger rounds."""
        latents, side = module.rollout.latents, module.policy.resolution
        more = self.sizes.plan.images - len(latents)
        size = more * (latents[0].numel() * latents.element_size() + 3 * 4 * side**2)
        return f"A round of the run has {more} more images on each process. They take {gib(size)} more." if more else ""


def read_back(trainer: Trainer, module: DiffusionNFT) -> float:
    """Read the newest checkpoint and compare its adapters with the module's; returns the seconds that reading took.

    Raises:
        RuntimeError: The adapters differ.
    """
    (folder,) = (callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, RoundCheckpoint))
    begun, file = time.perf_counter(), Path(str(folder)) / LAST
    saved = load_checked(file, TO_FIT, map_location="cpu", weights_only=True)["state_dict"]
    seconds, current = time.perf_counter() - begun, module.state_dict()
    if different := [name for name, tensor in saved.items() if not torch.equal(tensor, current[name].cpu())]:
        raise RuntimeError(f"A checkpoint must hold the adapters that it was written from. Found another {different[0]}.")
    return seconds
