"""Short runs of a module on the random checkpoints, and reference gradients by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from balancers import Balancer
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.evaluation.settings import Evaluation
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Objective, add_noise, nft_losses
from marble_lightning.nft.reward_gradients import flat, gradients_by_passes
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.averaging import Averaging
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.tinyworld import PROMPTS
from tests.helpers.small_rewards import Brightness, Contrast, Redness


class Gradients(Callback):
    """Records the gradient, the micro-batches and the initial weights of every optimizer step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.gradients: list[Tensor] = []
        self.states: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.states or batch_idx % pl_module.plan.per_step == 0:
            self.states.append(copy.deepcopy(pl_module.policy.transformer.state_dict()))
            self.batches.append([])
        self.batches[-1].append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % pl_module.plan.per_step == 0:
            self.gradients.append(flat([parameter.grad for parameter in pl_module.trainable]))


def run(
    checkpoints: Path,
    folder: Path,
    balancer: Balancer,
    rounds: int = 1,
    callbacks: Sequence[Callback] = (),
    kind: type[DiffusionNFT] = DiffusionNFT,
    micro_batch_size: int = 6,
    gradient_passes: Literal["two", "per_reward"] = "two",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    lr_scheduler: Any = None,
    precision: Any = "32-true",
    plugins: Any = None,
    data: PromptDataModule | None = None,
    rewards: Sequence[str] = ("bright", "red", "contrast"),
    ckpt_path: Path | None = None,
    inner_epochs: int = 1,
    clip: float | None = None,
    ema_warmup: bool = False,
    policy: FlowPolicy | None = None,
    optimizer: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    **objective: Any,
):
    module = kind(
        policy
        or SD3Policy(
            str(checkpoints / "sd3"),
            resolution=16,
            rank=2,
            alpha=4,
            text_length=4,
            dtype="float32",
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        ),
        rewards={name: {"bright": Brightness, "red": Redness, "contrast": Contrast}[name]() for name in rewards},
        sampling=Sampling(steps=4, batch_size=12, times_per_image=2),
        objective=Objective(beta=0.5, **objective),
        averaging=Averaging(old_rate=0.5, old_cap=0.5, ema_decay=0.75, ema_warmup=ema_warmup),
        evaluation=Evaluation(steps=2),
        micro_batch_size=micro_batch_size,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        gradient_passes=gradient_passes,
        inner_epochs=inner_epochs,
    )
    recorded = Gradients()
    trainer = Trainer(
        accelerator="cpu", max_epochs=rounds, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[balancer, recorded, *callbacks], limit_val_batches=0, default_root_dir=folder,
        precision=None if plugins else precision, plugins=plugins, gradient_clip_val=clip,
    )  # fmt: skip
    data = data or PromptDataModule(
        str(PROMPTS), ["ocr", "geneval"], prompts_per_round=4, images_per_prompt=3, cap_per_source=60
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, recorded


def reference(module: DiffusionNFT, recorded: Gradients, step: int) -> tuple[Tensor, Tensor]:
    """Per-reward gradients (reward, parameter) and the KL gradient of one step, by plain autograd over all samples."""
    module.policy.transformer.load_state_dict(recorded.states[step])
    totals, divergence = [], []
    for batch in recorded.batches[step]:
        noisy = add_noise(batch.clean, batch.noise, batch.t)
        old, base, velocity = (module.step.velocity(batch, name) for name in ("old", None, "trained"))
        plus, minus = nft_losses(velocity, old, noisy, batch.clean, batch.t, module.objective.beta)
        totals.append(batch.coefficients.losses(plus, minus))
        divergence.append((velocity - base).square().mean())
    losses, kl = torch.stack(totals).sum(0), torch.stack(divergence).mean()
    return gradients_by_passes(losses, module.trainable), gradients_by_passes(kl[None], module.trainable)[0]
