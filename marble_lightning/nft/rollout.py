"""A round: images sampled with the old policy, what their scores weigh, and micro-batches cut out of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Trainer
from torch import Tensor

from balancers import Balancer
from marble_lightning.nft.advantages import apply_advantage_mode, group_advantages
from marble_lightning.nft.loss import Coefficients, Objective, coefficients, noised
from marble_lightning.policies.base import Conditions
from marble_lightning.scoring.failures import only_finite
from marble_lightning.scoring.settings import Scoring
from marble_lightning.utils.seeds import generator


@dataclass
class Rollout:
    """The images of one round on this rank, in groups of k per prompt.

    `latents` (image, ...) are the clean latents; `conditions` one row per distinct prompt; `groups` (image,) points
    into it.
    """

    conditions: Conditions
    groups: Int[Tensor, " image"]
    latents: Float[Tensor, "image *latent"]


@dataclass
class MicroBatch:
    """Some images, each at one flow time."""

    clean: Float[Tensor, "batch *latent"]
    noise: Float[Tensor, "batch *latent"]
    t: Float[Tensor, " batch"]
    conditions: Conditions
    coefficients: Coefficients

    @property
    def noisy(self) -> Float[Tensor, "batch *latent"]:
        """x_t, what the policy sees."""
        return noised(self.clean, self.noise, self.t)


@dataclass(frozen=True)
class Plan:
    """How a round becomes micro-batches.

    Args:
        images: Images of the round on this rank.
        times: Flow times used of each image in an inner epoch.
        batch_size: Images of a micro-batch.
        optimizer_steps: Optimizer steps of an inner epoch.
        inner_epochs: How often all images are trained on.
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
    """From this rank's scores to its images' coefficients in each inner epoch, with statistics over all ranks.

    Args:
        scores: Reward of each image, NaN where it does not apply.
        groups: Index of each image's prompt on this rank; ranks share no prompt.
        balancer: May merge rewards before advantages exist, or the advantages; None keeps every reward apart.
        objective: Settings of the loss.
        plan: Which images fall into which optimizer step, with `keys`.
        keys: Seed of each inner epoch's order.
        trainer: Its strategy gathers and sums over ranks.
        scoring: What happens where a balancer's merged rewards or advantages are infinite.

    Raises:
        RewardError: They are, and `scoring` does not allow it; on all ranks.
    """
    strategy, rank = trainer.strategy, trainer.global_rank
    groups = groups + rank * (int(groups.max()) + 1)
    everyone, all_groups = (strategy.all_gather(part).reshape(-1, *part.shape[1:]) for part in (scores, groups))
    merged = everyone
    if balancer:
        merged = balancer.merge_rewards(everyone, ~everyone.isnan())
        names = balancer.reward_names if merged.shape == everyone.shape else balancer.names
        merged = only_finite(merged, everyone, names, scoring)
    advantages = group_advantages(merged, all_groups, objective.advantage_std)
    if balancer:
        advantages = only_finite(balancer.merge_advantages(advantages), everyone, balancer.names, scoring)
    advantages = apply_advantage_mode(advantages[rank * len(scores) : (rank + 1) * len(scores)], objective.advantage_mode)

    weighed = []
    for key in keys:
        plus, minus = torch.empty_like(advantages), torch.empty_like(advantages)
        for step in image_order(plan, key).chunk(plan.optimizer_steps):
            counts = plan.times * (~advantages[step].isnan()).sum(0).float()
            counts = strategy.reduce(counts, reduce_op="mean")  # not the sum: gradients are averaged over ranks
            plus[step], minus[step] = coefficients(advantages[step], counts, objective.beta, objective.max_advantage)
        weighed.append(Coefficients(plus, minus))
    return weighed


def micro_batches(
    rollout: Rollout, weighed: Coefficients, grid: Float[Tensor, " step"], plan: Plan, key: Sequence[int | str]
) -> Iterator[MicroBatch]:
    """Cut an inner epoch into micro-batches: images in random order, each at `plan.times` distinct times of the grid.

    An optimizer step meets all its images at their first time, then at their second, and so on, so that an estimate from
    its first micro-batches sees many images.

    Args:
        rollout: The round.
        weighed: Coefficients of each image, already normalised over its optimizer step.
        grid: Flow times to draw from, in (0, 1].
        plan: Sizes.
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
                noise=noise.to(device, non_blocking=True),  # or the host would wait for the device to catch up
                t=times[chosen, column],
                conditions=rollout.conditions[rollout.groups[chosen]],
                coefficients=Coefficients(weighed.plus[chosen], weighed.minus[chosen]),
            )


class MicroBatches:
    """A round's micro-batches as a data loader: their number is known before the round is sampled.

    Args:
        number: Micro-batches of a round.
        cut: Cuts the round at hand, once it is there.
    """

    def __init__(self, number: int, cut: Callable[[], Iterator[MicroBatch]]) -> None:
        self.number, self.cut = number, cut

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.cut()  # lazily: Lightning asks for the first round's iterator before it is sampled


def image_order(plan: Plan, key: Sequence[int | str]) -> Int[Tensor, " image"]:
    """The order in which a round's images are trained on; optimizer step s takes the s-th part of it."""
    return torch.randperm(plan.images, generator=generator(*key, "order"))
