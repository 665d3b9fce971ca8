"""Training on two ranks, which saves the micro-batches and the results of each rank.

With a name of `sharded_runs.CASES` it trains by several strategies instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, distributed

import balancers
from balancers import Balancer
from marble_lightning.callbacks.image_drift import ImageDriftMonitor
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Coefficients, Objective
from marble_lightning.nft.rollout import MicroBatch, MicroBatches
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.tinyworld import PROMPTS
from tests.helpers import sharded_runs
from tests.helpers.forks import on_two_ranks
from tests.helpers.small_rewards import Brightness, Contrast, Redness

STEPS = 5
"""Optimizer steps, one per round; with a refresh every other step, both kinds of steps occur."""


class Recorder(Callback):
    """Records the micro-batches and image statistics of this rank, round by round."""

    def __init__(self) -> None:
        self.rounds: list[list[MicroBatch]] = []
        self.statistics: list[Tensor] = []
        """Image statistics of this rank's images, round by round."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
        if batch_idx == 0 and pl_module.image_statistics is not None:
            self.statistics.append(pl_module.image_statistics)
        if batch_idx == 0:
            self.rounds.append([])
        self.rounds[-1].append(batch)


class Replay(DiffusionNFT):
    """Trains on recorded micro-batches of several ranks instead of new rounds."""

    recorded: list[list[list[MicroBatch]]]
    """By rank and round."""

    def on_train_epoch_start(self) -> None:
        self.trained_since = 0.0

    def train_dataloader(self) -> MicroBatches:
        return MicroBatches(self.plan.total, self._replay)

    def _replay(self) -> Iterator[MicroBatch]:
        for rounds in self.recorded:
            for batch in rounds[self.current_epoch]:
                # gradients are averaged over ranks, but summed over the batches of one process
                shares = (coefficients / len(self.recorded) for coefficients in batch.coefficients)
                yield MicroBatch(batch.clean, batch.noise, batch.t, batch.conditions, Coefficients(*shares), batch.in_first)


def train(kind: type[DiffusionNFT], checkpoints: Path, balancer: Balancer, recorded: Any = None, **options: Any) -> Any:
    """Train five optimizer steps; returns the module, the recorder and the monitor of image drift."""
    module = kind(
        SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, text_length=4, dtype="float32"),
        rewards={"bright": Brightness(), "red": Redness(), "contrast": Contrast()},
        sampling=Sampling(steps=4, batch_size=12, times_per_image=2),
        objective=Objective(beta=0.5, max_advantage=0.5, kl_weight=0.5),
        evaluation=Evaluation(steps=2),
        micro_batch_size=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=10.0),
    )
    module.recorded = recorded  # type: ignore[assignment]
    recorder, monitor = Recorder(), ImageDriftMonitor()
    trainer = Trainer(
        accelerator="cpu", max_epochs=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[balancer, recorder, monitor], limit_val_batches=0, **options,
    )  # fmt: skip
    data = PromptDataModule(str(PROMPTS), ["ocr", "geneval"], prompts_per_round=4, images_per_prompt=3)
    trainer.fit(module, datamodule=data)
    return module, recorder, monitor


def method(name: str) -> Balancer:
    """A balancer, or `split` for MARBLE on the signal; gradient methods refresh and reuse weights within five steps."""
    if name == "split":
        return balancers.MARBLE(refresh_every=2, ema_decay=0.5, gram="split", gram_decay=0.5)
    kind: type[Balancer] = getattr(balancers, name)
    return kind() if name == "WeightedSum" else kind(refresh_every=2, ema_decay=0.5)


def count_broadcasts() -> list[int]:
    """The bytes of each broadcast of DistributedDataParallel in this process, from now on."""
    counts: list[int] = []
    broadcast: Any = distributed._broadcast_coalesced  # type: ignore[attr-defined]

    def counted(group: Any, tensors: list[Tensor], *arguments: Any) -> None:
        counts.append(sum(tensor.nbytes for tensor in tensors))
        broadcast(group, tensors, *arguments)

    distributed._broadcast_coalesced = counted  # type: ignore[attr-defined]
    return counts


def on_a_rank(name: str, checkpoints: Path, folder: Path) -> None:
    broadcasts = count_broadcasts()
    module, recorder, monitor = train(
        DiffusionNFT, checkpoints, method(name), devices=2, strategy="ddp", default_root_dir=folder
    )
    result = {
        "rounds": recorder.rounds,
        "parameters": [parameter.detach() for parameter in module.trainable],
        "statistics": recorder.statistics,
        "reference": monitor.reference,
        "broadcasts": broadcasts,
    }
    torch.save(result, folder / f"{name}_{module.global_rank}.pt")


def run_each(checkpoints: Path, folder: Path, names: list[str]) -> str:
    """Run cases one after another; returns the end of what the first failing one printed."""
    for name in names:
        case = sharded_runs.on_a_rank if name in sharded_runs.CASES else on_a_rank
        if any(on_two_ranks(partial(case, name, checkpoints, folder), output := folder / name)):
            return output.with_suffix(".0").read_text()[-3000:]
    return ""
