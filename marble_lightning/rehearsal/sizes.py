"""The configured sizes of a run, and the small ones of its rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, gcd, lcm
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from marble_lightning.checkpoints.callback import RoundCheckpoint
from marble_lightning.data.datamodule import PromptDataModule, get_datamodule
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.rollout import Plan

ROUNDS = 2
"""Rounds of a rehearsal: the first one warms up and always solves the balancer's program, the second one is timed."""
PER_STEP = 2
"""Micro-batches of its optimizer steps, where the run has as many: the first of each kind warms up."""


@dataclass(frozen=True)
class RunSizes:
    """What each process of a run does.

    Args:
        rounds: Number of rounds; 1 stands for a run without end.
        plan: The micro-batches of a round.
        sampling_batch: Images sampled at once.
        overlap: Whether a batch is scored while the next one is sampled.
        held_out: Held-out images sampled in all evaluations, that of the base included.
        checkpoints: Number of checkpoints written.
    """

    rounds: int
    plan: Plan
    sampling_batch: int
    overlap: bool
    held_out: int
    checkpoints: int


def run_sizes(trainer: Trainer, module: DiffusionNFT) -> RunSizes:
    """The configured sizes of a run. Its data module must be set up, and its settings checked."""
    rounds = 1 if trainer.max_epochs in (None, -1) else int(trainer.max_epochs)  # type: ignore[arg-type]
    data, limit, every = get_datamodule(trainer), trainer.limit_val_batches, trainer.check_val_every_n_epoch
    images, batch = ceil(len(data.held_out) / trainer.world_size), data.held_out_batch_size
    images = min(limit * batch, images) if isinstance(limit, int) else ceil(limit * images)
    base = min(trainer.num_sanity_val_steps * batch, images)
    every_n_rounds = [
        callback._every_n_epochs for callback in trainer.checkpoint_callbacks if isinstance(callback, RoundCheckpoint)
    ]
    return RunSizes(
        rounds=rounds,
        plan=module.plan,
        sampling_batch=module.sampling.batch_size,
        overlap=module.scorer.settings.overlap,
        held_out=int(base) + (rounds // every * images if every else 0),
        checkpoints=sum(ceil(rounds / every) for every in every_n_rounds),
    )


def smallest_round(data: PromptDataModule, ranks: int, multiple: int, least: int) -> tuple[int, int]:
    """Prompts of the smallest round, and images of each, so that a process has a `multiple` of images and the `least`.

    It has at most the configured prompts and images, and of several such rounds the most prompts.
    """
    unit = lcm(sum(data.shares.values()), ranks)
    found = [
        (prompts // ranks * images, -prompts, images)
        for prompts in range(unit, data.prompts_per_round + 1, unit)
        for images in range(2, data.images_per_prompt + 1)
        if prompts // ranks * images % multiple == 0 and prompts // ranks * images >= least
    ]
    _, prompts, images = min(found)
    return -prompts, images


def shrink(trainer: Trainer, module: DiffusionNFT, folder: Path) -> None:
    """Make a run small, after the checks of its settings: few rounds of few images, one optimizer step a round.

    Batches of sampling, micro-batches and batches of held-out prompts keep their sizes, as far as the run has so many
    images, so that the peak of memory is the run's.

    Args:
        trainer: The run's trainer.
        module: Its module.
        folder: Folder of all files that the run writes.
    """
    data, ranks, plan = get_datamodule(trainer), trainer.world_size, module.plan
    every = module.objective.kl_every
    times = min(max(PER_STEP, every), plan.times)
    least = min(max(plan.batch_size * PER_STEP // times, module.sampling.batch_size), plan.images)
    multiple = plan.batch_size * every // gcd(every, times)  # `kl_every` divides the micro-batches of a step
    data.prompts_per_round, data.images_per_prompt = smallest_round(data, ranks, multiple, least)
    of_prompt = len(data.shares) * data.held_out_images
    batch = max(data.held_out_batch_size * ranks // of_prompt, ceil(ranks / of_prompt))
    data.held_out_per_source = min(batch, data.held_out_per_source or batch)
    module.sampling, module.sizes = replace(module.sampling, times_per_image=times), (plan.batch_size, 1, 1)

    policy: Any = module.policy
    if getattr(policy, "prompt_cache", None) is not None:
        policy.prompt_cache = str(folder / "prompt_cache")
    trainer.fit_loop.max_epochs = trainer.check_val_every_n_epoch = ROUNDS
    trainer.val_check_interval = 1.0
    for callback in trainer.checkpoint_callbacks:
        callback.dirpath = None  # type: ignore[attr-defined] # the run's folder, which is in `folder`
