"""A round as it is sampled: images of the old policy, scored while the next ones are sampled."""

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

from marble_lightning.checkpoints.signals import end_if_asked
from marble_lightning.data.datamodule import get_datamodule
from marble_lightning.nft.divergence import Finite
from marble_lightning.nft.rollout import Rollout
from marble_lightning.policies.base import FlowPolicy
from marble_lightning.policies.samplers import Solver
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.utils.seeds import generator
from marble_lightning.utils.validation import require, require_one_of


@dataclass(frozen=True)
class Sampling:
    """How a round's images are sampled and which of its flow times are trained on.

    Args:
        steps: Solver steps of a rollout, >= 1.
        solver: `dpm2` (DPM-Solver++ 2M) or `euler`; one network evaluation a step either way.
        batch_size: Images sampled at once, >= 1.
        times_per_image: Times of the rollout that each image is trained on, its own, drawn anew each round; null takes
            all. The published run takes 24 of 25 (its `timestep_fraction` of 0.99).
        noisiest_fraction: Share (0, 1] of the rollout's times, from the noisiest, that are drawn from.
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
        """Times of the grid that are drawn from."""
        return int(self.noisiest_fraction * self.steps + 1e-9)  # 0.58 * 50 is a rounding below 29

    @property
    def times(self) -> int:
        """Times trained on per image."""
        return self.usable_times if self.times_per_image is None else self.times_per_image


class ScoredRollout(NamedTuple):
    """A round on this rank as it was sampled.

    `images` (image, 3, pixel, pixel) in [0, 1]; `scores` (image, reward), NaN where there is none; `skipped` says how many
    images each reward failed on, over all ranks; `waited` the seconds that scores took when all was sampled.
    """

    rollout: Rollout
    images: Float[Tensor, "image 3 pixel pixel"]
    scores: Float[Tensor, "image reward"]
    skipped: Mapping[str, float]
    waited: float


def key_of(trainer: Trainer, seed: int, purpose: str) -> tuple[int | str, ...]:
    """What seeds one purpose of this round on this rank."""
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
    """Sample the k images of each distinct prompt, encoded once, with the old adapter, scoring them meanwhile.

    Args:
        trainer: Whose round it is.
        policy: Samples.
        scorer: Scores.
        names: Rewards that score.
        sampling: How.
        finite: Takes note of latents and images that are not finite.
        seed: Of prompts and noise: the run's for the round to train on, another for an independent one.

    Raises:
        Diverged: Images are not finite; on all ranks.
        RewardError: A reward failed; on all ranks, whichever it was.
    """
    scorer.release()  # Lightning put them there, and text encoders need the room
    data = get_datamodule(trainer)
    prompts = data.round(seed, trainer.current_epoch, trainer.global_rank, trainer.world_size)
    conditions = policy.encode([prompt.text for prompt in prompts])
    groups = torch.arange(len(prompts)).repeat_interleave(data.images_per_prompt)
    latents, side, device = [], policy.resolution, policy.device
    images = torch.empty(len(groups), 3, side, side, device=device)  # to be filled: there is no room for them twice
    for chunk in progress(trainer, torch.arange(len(groups)).split(sampling.batch_size), "sampling"):
        end_if_asked(trainer)
        noise = [generator(*key_of(trainer, seed, "rollout"), index) for index in chunk.tolist()]
        own = groups[chunk]
        with trainer.precision_plugin.forward_context():  # as in training, so that the loss sees its own policy
            sampled = policy.sample(conditions[own.to(device)], noise, "old", steps=sampling.steps, solver=sampling.solver)
        latents.append(sampled)
        drawn = images[chunk[0] : chunk[-1] + 1].copy_(policy.decode(sampled))
        finite.note(sampled, drawn)
        scorer.submit(drawn, [prompts[group] for group in own.tolist()], names)
    sampled_all = time.perf_counter()
    scores = scorer.collect(lambda jobs: progress(trainer, jobs, "scoring"))
    waited = time.perf_counter() - sampled_all
    end_if_asked(trainer)  # some scores may have been given up
    finite.check_pictures(trainer.strategy, trained=trainer.global_step > 0)
    skipped = scorer.check(trainer.strategy)
    scorer.release()
    return ScoredRollout(Rollout(conditions, groups.to(device), torch.cat(latents)), images, scores, skipped, waited)


def progress(trainer: Trainer, iterable: Any, doing: str) -> Any:
    """A bar for a part of a round, where the trainer shows any."""
    silent = not trainer.is_global_zero or trainer.progress_bar_callback is None
    return tqdm(iterable, f"Round {trainer.current_epoch}: {doing}", leave=False, dynamic_ncols=True, disable=silent)
