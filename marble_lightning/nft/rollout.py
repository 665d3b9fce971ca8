"""A round: images sampled with the old adapter, their loss coefficients, and the micro-batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import Trainer
from torch import Tensor

from balancers import Balancer
from marble_lightning.nft.advantages import apply_advantage_mode, group_advantages
from marble_lightning.nft.loss import Coefficients, Objective, add_noise, coefficients
from marble_lightning.policies.base import Conditions
from marble_lightning.scoring.failures import infinite_to_nan
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.seeds import generator


@dataclass
class Rollout:
    """The images of one round on this rank, in groups of k per prompt.

    `latents` (image, ...) are the clean latents. `conditions` has one row per distinct prompt. `groups` (image,) is the
    row of each image's prompt in `conditions`. `in_first` (image,) tells whether the prompt is in the first of two halves,
    see `first_half`.
    """

    conditions: Conditions
    groups: Int[Tensor, " image"]
    latents: Float[Tensor, " image *latent"]
    in_first: Bool[Tensor, " image"]


@dataclass
class MicroBatch:
    """Some images, each at one flow time."""

    clean: Float[Tensor, " batch *latent"]
    noise: Float[Tensor, " batch *latent"]
    t: Float[Tensor, " batch"]
    conditions: Conditions
    coefficients: Coefficients
    in_first: Bool[Tensor, " batch"]

    @property
    def noisy(self) -> Float[Tensor, " batch *latent"]:
        """x_t, the input of the policy."""
        return add_noise(self.clean, self.noise, self.t)


@dataclass(frozen=True)
class Plan:
    """How a round is split into micro-batches.

    Args:
        images: Images of the round on this rank.
        times: Number of flow times of each image in an inner epoch.
        batch_size: Images of a micro-batch.
        optimizer_steps: Optimizer steps of an inner epoch.
        inner_epochs: Passes over all images of the round.
    """

    images: int
    times: int
    batch_size: int
    optimizer_steps: int
    inner_epochs: int = 1

    def __post_init__(self) -> None:
        unit = self.batch_size * self.optimizer_steps
        if self.images % unit:
            raise ValueError(
                "A round's images per rank must be a multiple of `micro_batch_size` x `optimizer_steps_per_round` = "
                f"{self.batch_size} x {self.optimizer_steps} = {unit}. Found {self.images}; "
                "change `prompts_per_round`, `images_per_prompt` or `micro_batch_size`."
            )

    @property
    def per_step(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.images // (self.batch_size * self.optimizer_steps) * self.times

    @property
    def total(self) -> int:
        """Micro-batches of the round."""
        return self.per_step * self.optimizer_steps * self.inner_epochs


def compute_coefficients(
    scores: Float[Tensor, "image reward"],
    groups: Int[Tensor, " image"],
    balancer: Balancer | None,
    objective: Objective,
    plan: Plan,
    keys: Sequence[Sequence[int | str]],
    trainer: Trainer,
    scoring: Scoring = Scoring(),
) -> list[Coefficients]:
    """Loss coefficients of this rank's images in each inner epoch, with statistics over all ranks.

    Args:
        scores: Rewards of each image, NaN where a reward does not apply.
        groups: Index of each image's prompt on this rank; ranks share no prompt.
        balancer: May merge the rewards or the advantages; None merges neither.
        objective: Settings of the loss.
        plan: Assigns images to optimizer steps, together with `keys`.
        keys: Seed of each inner epoch's order.
        trainer: Its strategy gathers and averages over ranks.
        scoring: Settings for infinite values among a balancer's merged rewards or advantages.

    Raises:
        RewardError: A merged value is infinite, and `scoring` does not allow it; raised on all ranks.
    """
    strategy, rank = trainer.strategy, trainer.global_rank
    all_scores, all_groups = gather_round(scores, groups, trainer)
    merged, applies = all_scores, ~all_scores.isnan()
    if balancer:
        merged = balancer.merge_rewards(all_scores, applies)
        merged = infinite_to_nan(merged, applies, balancer, scoring)
    advantages = group_advantages(merged, all_groups, objective.advantage_std)
    if balancer:
        advantages = infinite_to_nan(balancer.merge_advantages(advantages), applies, balancer, scoring)
    advantages = apply_advantage_mode(advantages[rank * len(scores) : (rank + 1) * len(scores)], objective.advantage_mode)

    per_inner_epoch = []
    for key in keys:
        plus, minus = torch.empty_like(advantages), torch.empty_like(advantages)
        for step in image_order(plan, key).chunk(plan.optimizer_steps):
            counts = plan.times * (~advantages[step].isnan()).sum(0).float()
            counts = strategy.reduce(counts, reduce_op="mean")  # not the sum: gradients are averaged over ranks
            plus[step], minus[step] = coefficients(advantages[step], counts, objective.beta, objective.max_advantage)
        per_inner_epoch.append(Coefficients(plus, minus))
    return per_inner_epoch


def gather_round(
    scores: Float[Tensor, "image reward"], groups: Int[Tensor, " image"], trainer: Trainer
) -> tuple[Float[Tensor, "sample reward"], Int[Tensor, " sample"]]:
    """The scores and prompts of the images of all ranks; ranks share no prompt."""
    groups = groups + trainer.global_rank * (int(groups.max()) + 1)
    gather = trainer.strategy.all_gather
    return gather(scores).reshape(-1, *scores.shape[1:]), gather(groups).reshape(-1)


def begin_round(
    balancer: Balancer, scores: Float[Tensor, "image reward"], groups: Int[Tensor, " image"], trainer: Trainer
) -> dict[str, float]:
    """Give a balancer the scores of all ranks, see `Balancer.begin_round`."""
    return balancer.begin_round(*gather_round(scores, groups, trainer))


def micro_batches(
    rollout: Rollout, weighed: Coefficients, grid: Float[Tensor, " step"], plan: Plan, key: Sequence[int | str]
) -> Iterator[MicroBatch]:
    """Split an inner epoch into micro-batches: images in random order, each at `plan.times` distinct times of the grid.

    An optimizer step takes all its images at their first time, then all at their second, and so on. So an estimate from
    its first micro-batches covers many images.

    Args:
        rollout: The round.
        weighed: Coefficients of each image, already normalised over its optimizer step.
        grid: Flow times to draw from, in (0, 1].
        plan: Sizes of the micro-batches and optimizer steps.
        key: Seed of order, times and noise.
    """
    device = rollout.latents.device
    draws = generator(*key, "times")
    times = torch.stack([torch.randperm(len(grid), generator=draws)[: plan.times] for _ in range(plan.images)])
    times, order = grid.to(device)[times.to(device)], image_order(plan, key).to(device)
    for step, column in product(order.chunk(plan.optimizer_steps), range(plan.times)):
        for chosen in step.split(plan.batch_size):
            clean = rollout.latents[chosen].float()
            noise = torch.randn(clean.shape, generator=draws, pin_memory=device.type == "cuda")
            yield MicroBatch(
                clean=clean,
                noise=noise.to(device, non_blocking=True),  # otherwise the host would wait for the device
                t=times[chosen, column],
                conditions=rollout.conditions[rollout.groups[chosen]],
                coefficients=Coefficients(weighed.plus[chosen], weighed.minus[chosen]),
                in_first=rollout.in_first[chosen],
            )


class MicroBatches:
    """A round's micro-batches as a data loader with a length that is known before the round is sampled.

    Args:
        number: Micro-batches of a round.
        split: Splits the sampled round into micro-batches.
    """

    def __init__(self, number: int, split: Callable[[], Iterator[MicroBatch]]) -> None:
        self.number, self.split = number, split

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.split()  # lazily: Lightning requests the iterator before the first round is sampled


def image_order(plan: Plan, key: Sequence[int | str]) -> Int[Tensor, " image"]:
    """The random order of a round's images; optimizer step s takes its s-th part."""
    return torch.randperm(plan.images, generator=generator(*key, "order"))


def first_half(prompts: int, rank: int, ranks: int, key: Sequence[int | str]) -> Bool[Tensor, " prompt"]:
    """Which prompts of this rank are in the first half of a round's prompts, drawn at random over all ranks.

    Args:
        prompts: Prompts of each rank.
        rank: Index of this rank.
        ranks: Their number.
        key: Seed of the draw, the same on all ranks.
    """
    drawn = torch.randperm(prompts * ranks, generator=generator(*key))
    return drawn[rank * prompts :][:prompts] < prompts * ranks / 2
