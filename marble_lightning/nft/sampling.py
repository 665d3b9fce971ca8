"""Sampling of a round: the old adapter samples images, which are scored while the next ones are sampled."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch import Trainer
from torch import Tensor
from tqdm import tqdm

from marble_lightning.checkpoints.signals import stop_if_requested
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.nft.divergence import Finite
from marble_lightning.nft.rollout import Rollout, first_half
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.samplers import Solver
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.utils.seeds import generator
from marble_lightning.utils.validation import require, require_one_of
from rewards import Reward


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling of a round, and of the flow times that are trained on.

    Args:
        steps: Solver steps of a rollout, >= 1.
        solver: `dpm2` (DPM-Solver++ 2M) or `euler`; both need one network evaluation per step.
        batch_size: Images sampled at once, >= 1.
        times_per_image: Number of the rollout's times that each image is trained on, drawn for each image and each round;
            null takes all. The published run takes 24 of 25 (its `timestep_fraction` of 0.99).
        noisiest_fraction: Share (0, 1] of the rollout's times, the noisiest ones, from which an image's times are drawn.
    """

    steps: int = 25
    solver: Solver = "dpm2"
    batch_size: int = 9
    times_per_image: int | None = None
    noisiest_fraction: float = 1.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, "`sampling.steps` must be >= 1", self.steps)
        require(self.batch_size >= 1, "`sampling.batch_size` must be >= 1", self.batch_size)
        require_one_of(Solver, "`sampling.solver`", self.solver)
        require(
            0 < self.noisiest_fraction <= 1 and self.usable_times >= 1,
            f"`sampling.noisiest_fraction` must leave 1 to {self.steps} of the times", self.noisiest_fraction,
        )  # fmt: skip
        require(
            1 <= self.times <= self.usable_times,
            f"`sampling.times_per_image` must be 1 to {self.usable_times}, the times `noisiest_fraction` leaves of `steps`",
            self.times_per_image,
        )

    @property
    def usable_times(self) -> int:
        """Number of times of the grid from which the times of an image are drawn."""
        return int(self.noisiest_fraction * self.steps + 1e-9)  # 0.58 * 50 is slightly below 29

    @property
    def times(self) -> int:
        """Number of times that each image is trained on."""
        return self.usable_times if self.times_per_image is None else self.times_per_image


class ScoredRollout(NamedTuple):
    """A sampled and scored round on this rank.

    `images` (image, 3, pixel, pixel) are in [0, 1]. `scores` (image, reward) are NaN where there is none. `missing` is the
    number of images that each reward applies to and has no score for, and `skipped` that of images that it failed on, over
    all ranks. `encoded` is the time that the prompts took, and `waited` that from the last sampled image to the last score,
    in seconds.
    """

    rollout: Rollout
    images: Float[Tensor, "image 3 pixel pixel"]
    scores: Float[Tensor, "image reward"]
    missing: Mapping[str, float]
    skipped: Mapping[str, float]
    encoded: float
    waited: float

    def metrics(self, trainer: Trainer, rewards: Mapping[str, Reward], scorer: Scorer) -> dict[str, Tensor | float]:
        """Metrics over all ranks: each reward's mean, and its missing scores, skipped scores and seconds; time waited."""
        means = trainer.strategy.all_gather(self.scores).reshape(-1, len(rewards)).nanmean(0)
        metrics: dict[str, Tensor | float] = {f"train/{name}": mean for name, mean in zip(rewards, means, strict=True)}
        metrics |= {f"missing/{name}": self.missing[name] for name in rewards}
        metrics |= {f"skipped/{name}": self.skipped[name] for name in rewards}
        metrics |= {"time/encoding": self.encoded, "time/waiting_for_scores": self.waited}
        return metrics | {f"time/scoring/{name}": seconds for name, seconds in scorer.seconds.items()}


def seed_key(trainer: Trainer, seed: int, purpose: str) -> tuple[int | str, ...]:
    """Seed of one purpose in this round on this rank."""
    return seed, trainer.current_epoch, trainer.global_rank, purpose


def sample_round(
    trainer: Trainer,
    policy: FlowPolicy,
    scorer: Scorer,
    names: Sequence[str],
    sampling: Sampling,
    finite: Finite,
    seed: int,
) -> ScoredRollout:
    """Sample k images of each distinct prompt with the old adapter, and score each batch while the next is sampled.

    Each distinct prompt is encoded once.

    Args:
        trainer: The trainer, with the index of the round, the rank and the data module.
        policy: The model that samples.
        scorer: Runs the rewards.
        names: Rewards that score the images.
        sampling: Settings of the sampling.
        finite: Records latents and images that are not finite.
        seed: Seed of prompts and noise: the run's for the round that is trained on, another for an independent round.

    Raises:
        Diverged: Images are not finite; raised on all ranks.
        RewardError: A reward failed on any rank; raised on all ranks.
    """
    scorer.release()  # the text encoders need the memory
    data = get_datamodule(trainer)
    prompts = data.round(seed, trainer.current_epoch, trainer.global_rank, trainer.world_size)
    begin = time.perf_counter()
    conditions = policy.encode([prompt.text for prompt in prompts])
    encoded = time.perf_counter() - begin
    groups = torch.arange(len(prompts)).repeat_interleave(data.images_per_prompt)
    latents, side, device = [], policy.resolution, policy.device
    images = torch.empty(len(groups), 3, side, side, device=device)  # filled in place, since a second copy would not fit
    for chunk in progress(trainer, torch.arange(len(groups)).split(sampling.batch_size), "sampling"):
        stop_if_requested(trainer, f"a batch of images of round {trainer.current_epoch}")
        noise = [generator(*seed_key(trainer, seed, "rollout"), index) for index in chunk.tolist()]
        rows = groups[chunk]
        with trainer.precision_plugin.forward_context():  # as in training, where the old velocities are computed again
            sampled = policy.sample(conditions[rows.to(device)], noise, "old", steps=sampling.steps, solver=sampling.solver)
        latents.append(sampled)
        decoded = images[chunk[0] : chunk[-1] + 1].copy_(policy.decode(sampled))
        finite.note(sampled, decoded)
        scorer.submit(decoded, [prompts[row] for row in rows.tolist()], names)
    sampling_ended = time.perf_counter()
    scores = scorer.collect(lambda jobs: progress(trainer, jobs, "scoring"))
    waited = time.perf_counter() - sampling_ended
    # scores may be incomplete after a request to stop
    stop_if_requested(trainer, f"the scores of round {trainer.current_epoch}")
    finite.check_images(trainer.strategy, trained=trainer.global_step > 0)
    skipped = scorer.check(trainer.strategy)
    scorer.release()
    halves = first_half(len(prompts), trainer.global_rank, trainer.world_size, (seed, trainer.current_epoch, "halves"))
    rollout = Rollout(conditions, groups.to(device), torch.cat(latents), halves[groups].to(device))
    return ScoredRollout(rollout, images, scores, scorer.unscored, skipped, encoded, waited)


def progress(trainer: Trainer, iterable: Any, task: str) -> Any:
    """Wrap an iterable in a progress bar for one task of a round, if the trainer shows progress bars."""
    silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(iterable, f"Round {trainer.current_epoch}: {task}", leave=False, dynamic_ncols=True, disable=silent)
