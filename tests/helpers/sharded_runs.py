"""Runs on two ranks by DDPStrategy and by ShardedBaseStrategy, for `two_processes`.

Each rank saves how often it has gathered weights, and how much of the base it holds. All else is in the checkpoints.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor

from balancers import MARBLE
from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.memory import Memory, estimate_memory
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies import SD3Policy, ShardedBaseStrategy, ZImagePolicy
from marble_lightning.policies.base import is_adapter
from marble_lightning.tinyworld import PROMPTS
from tests.helpers.small_rewards import Brightness, Contrast, Redness

CASES: dict[str, dict[str, Any]] = {
    "sharded": {},
    "sharded_checkpointing": {"gradient_checkpointing": True},
    "sharded_per_reward": {"gradient_passes": "per_reward"},
    "sharded_z_image": {"path": "z_image", "text_length": 96},
}
"""Options of the runs, by the name of the case."""


class Estimated(Memory):
    """Keeps the estimate of a sharded run's first process."""

    parts: dict[str, int] | None = None

    def _estimate(self, trainer: Trainer, pl_module: LightningModule, shards: int = 1) -> None:
        if trainer.is_global_zero and shards > 1 and trainer.max_epochs == 1 and isinstance(pl_module, DiffusionNFT):
            self.parts = dict(estimate_memory(pl_module, trainer.world_size, cuda=False, shards=shards).parts)


class Recorder(Callback):
    """Counts the gatherings of weights in each phase, and the numbers in frozen weights, all and those of this process."""

    def __init__(self) -> None:
        self.phase, self.gathered, self.sizes = "other", Counter[str](), [0, 0]

    def count(self, gather: Any) -> Any:
        """A function that gathers, with a count of its calls."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.gathered[self.phase] += 1
            return gather(*arguments, **options)

        return counted

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self.phase = "held-out"

    on_validation_start = on_sanity_check_start

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.phase = "sampling"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.phase = "plain step" if batch_idx else "refresh"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        parameters = pl_module.policy.transformer.named_parameters()
        frozen = [parameter for name, parameter in parameters if not is_adapter(name)]
        here = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in frozen]
        self.sizes = [sum(parameter.numel() for parameter in parameters) for parameters in (frozen, here)]


def fit(
    folder: Path, strategy: Any, rounds: int, path: Path, resumed: Path | None = None, gradient_passes: Any = "two",
    text_length: int = 4, **options: Any,
) -> None:  # fmt: skip
    """Train so many rounds, each of a step with a refresh and a plain one; all files go to a folder."""
    policy = ZImagePolicy if path.name == "z_image" else SD3Policy
    module = DiffusionNFT(
        policy(str(path), resolution=16, rank=2, alpha=4, text_length=text_length, dtype="bfloat16", **options),
        rewards={"bright": Brightness(), "red": Redness(), "contrast": Contrast()},
        sampling=Sampling(steps=2, batch_size=6, times_per_image=1),
        objective=Objective(beta=0.5, max_advantage=0.5, kl_weight=0.5),
        evaluation=Evaluation(steps=1),
        micro_batch_size=3,
        optimizer_steps_per_round=2,
        gradient_passes=gradient_passes,
    )
    recorder, estimated, saved = Recorder(), Estimated(), RoundCheckpoint()
    saved.dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision="bf16-mixed", max_epochs=rounds, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=-1,
        callbacks=[MARBLE(refresh_every=2), recorder, saved, estimated],
    )  # fmt: skip
    data = PromptDataModule(
        str(PROMPTS), ["ocr", "geneval"], prompts_per_round=4, images_per_prompt=3, held_out_per_source=3,
        held_out_batch_size=2,
    )  # fmt: skip
    gather: Any = DefaultAllGather.__call__
    DefaultAllGather.__call__ = recorder.count(gather)  # type: ignore[method-assign]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resumed)
    finally:
        DefaultAllGather.__call__ = gather  # type: ignore[method-assign]
    found = {"gathered": recorder.gathered, "sizes": recorder.sizes, "parts": estimated.parts}
    if rounds == 1:
        trainer.validate(module, datamodule=data, verbose=False)  # an already sharded policy
        found["again"] = module.evaluator.trained_scores.tolist()  # type: ignore[union-attr]
    (folder / f"rank_{module.global_rank}.json").write_text(json.dumps(found))


def on_a_rank(name: str, checkpoints: Path, folder: Path) -> None:
    """Train two rounds by DDPStrategy, the first one by ShardedBaseStrategy too, and the second one from DDPStrategy's."""
    torch.set_num_threads(1)
    options = {"path": "sd3", **CASES[name]}
    options["path"] = checkpoints / options["path"]
    ddp, first, resumed = (folder / name / run for run in ("ddp", "first", "resumed"))
    fit(ddp, "ddp", 2, **options)
    fit(first, ShardedBaseStrategy(), 1, **options)
    fit(resumed, ShardedBaseStrategy(), 2, resumed=ddp / "round_0000.ckpt", **options)
