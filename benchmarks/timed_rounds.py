"""Rounds that train with several methods in turns within one run, and their times, for `benchmarks.training_speed`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from balancers import MARBLE, Balancer, WeightedSum
from benchmarks.phases import now
from marble_lightning.data.datamodule import PromptDataModule
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Objective
from marble_lightning.nft.sampling import Sampling
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.tinyworld import PROMPTS
from rewards import Reward

STEPS = 10
"""Optimizer steps of a round."""


@dataclass(frozen=True)
class Size:
    """Sizes of a run.

    Args:
        resolution: Side of the images in pixels.
        rank: LoRA rank; alpha is twice as much.
        batch: Images of a micro-batch and of a batch of sampling.
        text_length: Tokens of the third text encoder.
        dtype: Precision of the frozen weights.
        precision: The trainer's precision.
        steps: Optimizer steps of a round, of two micro-batches each.
    """

    resolution: int
    rank: int
    batch: int
    text_length: int
    dtype: Literal["float32", "bfloat16"]
    precision: Literal["32-true", "bf16-mixed"]
    steps: int = STEPS

    def policy(self, path: Path, compile: bool = False) -> SD3Policy:
        """A policy of this size from a pipeline's folder."""
        return SD3Policy(
            str(path), resolution=self.resolution, rank=self.rank, alpha=2 * self.rank, text_length=self.text_length,
            dtype=self.dtype, compile=compile,
        )  # fmt: skip


SIZES = {
    "tiny": Size(64, 16, 24, 1, "float32", "32-true"),
    "sd35m": Size(512, 32, 9, 128, "bfloat16", "bf16-mixed"),
}
"""By the name of the model."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    title: str
    paper: str
    every: int | None = None
    """Optimizer steps between two solutions; None for the weighted sum."""
    passes: Literal["two", "per_reward"] = "two"
    share: float = 1.0
    """Share of a step's two micro-batches whose gradients the solution uses; it applies to both."""
    gram: Literal["own", "split"] | None = "own"
    """Products to solve on; None: of whole gradients, without the parts from halves of the prompts."""
    kl_every: int = 1
    """`objective.kl_every`; 0: no KL term."""

    @property
    def objective(self) -> Objective:
        """The NFT loss."""
        return Objective(kl_every=self.kl_every) if self.kl_every else Objective(kl_weight=0.0)

    def balancer(self) -> Balancer:
        """A new balancer."""
        if self.every is None:
            return WeightedSum()
        options: dict[str, Any] = {"measure_signal": False} if self.gram is None else {"gram": self.gram, "gram_decay": 0.9}
        return MARBLE(refresh_every=self.every, estimate_share=self.share, **options)


SUM = Method("weighted sum", "1.00")
ONE_MICRO_BATCH = Method("MARBLE, every 10th step, half its images", "0.97 (one micro-batch)", every=10, share=0.5)
EVERY_STEP = Method("MARBLE, every step", "", every=1)
K_PASSES = Method("MARBLE, every step, K passes", "0.56 (K = 5)", every=1, passes="per_reward", gram=None)
WHOLE = Method("MARBLE, every step, whole gradients", "", every=1, gram=None)
SPLIT = Method("MARBLE, every step, gram: split", "", every=1, gram="split")
METHODS = (
    SUM,
    Method("MARBLE, every 10th step", "", every=10),
    ONE_MICRO_BATCH,
    EVERY_STEP,
    SPLIT,
    WHOLE,
    Method("MARBLE, every step, half its images", "", every=1, share=0.5),
    K_PASSES,
    *(
        Method(f"{method.title}, {kl}", "", every=method.every, kl_every=kl_every)
        for kl, kl_every in (("KL term on every other micro-batch", 2), ("no KL term", 0))
        for method in (SUM, EVERY_STEP)
    ),
)
"""Two backward passes, and gradients in two parts (`measure_signal`), unless the title says otherwise."""


class Projection(Reward):
    """A reward with negligible cost: the projection of the image's pixels on a random direction."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def score(self, *, images: Tensor, prompts: Any) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        return images.flatten(1) @ torch.randn(images[0].numel(), generator=draw).to(images.device)


class Turns(Callback):
    """Uses the next (method, number of rewards) in every round, and records its times.

    Args:
        turns: Methods and numbers of rewards that alternate.
        cycles: Full cycles to run, after a warm-up cycle.
    """

    def __init__(self, turns: list[tuple[Method, int]], cycles: int) -> None:
        self.turns, self.rounds = turns, (cycles + 1) * len(turns)
        self.balancers = [method.balancer() for method, _ in turns]
        self.training: dict[tuple[Method, int], list[float]] = defaultdict(list)
        self.whole: dict[tuple[Method, int], list[float]] = defaultdict(list)
        self.peak: dict[tuple[Method, int], float] = {}
        """Peak memory in MiB of a round."""
        self.training_peak: dict[tuple[Method, int], float] = {}
        """Peak memory in MiB of its micro-batches and optimizer steps; on a CUDA device only."""

    def complete(self) -> int:
        """Number of measured cycles in which every turn has a time; those of an unfinished cycle are dropped."""
        cycles = min(len(self.training[turn]) for turn in self.turns)
        for times in (self.training, self.whole):
            for turn in self.turns:
                del times[turn][cycles:]
        return cycles

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(DiffusionNFT, pl_module)
        self.taps, self.rewards = module.step.per_reward.taps, dict(module.rewards.items())
        self.bar = tqdm(total=self.rounds, desc="Rounds, the first of each a warm-up", dynamic_ncols=True)

    def use(self, module: DiffusionNFT, index: int) -> None:
        """Let a module train with the method and the number of rewards of a turn."""
        method, k = self.turns[index]
        module.rewards = dict(list(self.rewards.items())[:k])
        module.balancer = self.balancers[index]
        module.gradient_passes, module.objective = method.passes, method.objective
        module.step.objective = method.objective
        module.step.per_reward.taps = self.taps if method.passes == "two" else None
        module.balancer.bind(list(module.rewards))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.use(cast(DiffusionNFT, pl_module), trainer.current_epoch % len(self.turns))
        if on_gpu(trainer):
            torch.cuda.reset_peak_memory_stats()
        self.start = now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.sampled = now()
            if on_gpu(trainer):
                self.sampling_peak = torch.cuda.max_memory_allocated() / 2**20
                torch.cuda.reset_peak_memory_stats()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end, turn = now(), self.turns[trainer.current_epoch % len(self.turns)]
        if trainer.current_epoch >= len(self.turns):
            self.training[turn].append(end - self.sampled)
            self.whole[turn].append(end - self.start)
        if on_gpu(trainer):
            self.training_peak[turn] = torch.cuda.max_memory_allocated() / 2**20
            self.peak[turn] = max(self.sampling_peak, self.training_peak[turn])
        self.bar.set_postfix_str(f"{turn[0].title}, K = {turn[1]}: {end - self.sampled:.1f} s")
        self.bar.update()


def on_gpu(trainer: Trainer) -> bool:
    """Whether the run's model is on a CUDA device."""
    return trainer.strategy.root_device.type == "cuda"


def run(turns: Turns, size: Size, path: Path, device: str, rollout_steps: int, compile: bool = False) -> None:
    """Fit `turns.rounds` rounds.

    Args:
        turns: Sets the method of each round, and records its times.
        size: Sizes of the run.
        path: Folder of the pipeline.
        device: Lightning's accelerator.
        rollout_steps: Solver steps of a rollout.
        compile: Whether the transformer's blocks are compiled.
    """
    module = DiffusionNFT(
        size.policy(path, compile),
        rewards={f"reward_{index}": Projection(index) for index in range(max(k for _, k in turns.turns))},
        sampling=Sampling(steps=rollout_steps, batch_size=size.batch, times_per_image=2),
        micro_batch_size=size.batch,
        optimizer_steps_per_round=size.steps,
    )
    prompts = size.batch * size.steps // 6
    data = PromptDataModule(str(PROMPTS), ["pickscore"], prompts_per_round=prompts, images_per_prompt=6)
    trainer = Trainer(
        accelerator=device, devices=1, max_epochs=turns.rounds, callbacks=[WeightedSum(), turns], limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, precision=size.precision,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
