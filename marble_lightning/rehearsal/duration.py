"""How long a run will take, from the sizes of the run and the times that a rehearsal has measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from balancers import Balancer
from marble_lightning.rehearsal.sizes import RunSizes


@dataclass(frozen=True)
class Times:
    """Measured times of one process, in seconds.

    Args:
        loading: From the start to the first round or evaluation.
        encoding: The prompts of a round.
        sampling: An image of a round, decoded.
        scoring: The scores of an image, beside sampling (`RunSizes.overlap`) or after it.
        plain: A micro-batch.
        solving: A micro-batch with per-reward gradients.
        held_out: An image of an evaluation, with its scores; 0 without evaluations.
        saving: A checkpoint.
    """

    loading: float
    encoding: float
    sampling: float
    scoring: float
    plain: float
    solving: float
    held_out: float
    saving: float


def solving_micro_batches(sizes: RunSizes, balancer: Balancer) -> int:
    """Number of a run's micro-batches that compute per-reward gradients."""
    plan, options = sizes.plan, balancer.options
    if not balancer.needs_gradients:
        return 0
    steps = range(sizes.rounds * plan.optimizer_steps * plan.inner_epochs)
    refreshes = sum(options.is_due(step) and not options.is_uniform(step) for step in steps)
    return refreshes * options.estimated(plan.per_step)


def phases(sizes: RunSizes, times: Times, balancer: Balancer) -> Mapping[str, float]:
    """Seconds of the phases of a run: each time, multiplied by how often the run spends it.

    Sampling and scoring of a round with n images in batches of b take n (s + r), or with `overlap`, as two stages that run
    side by side, n max(s, r) + b min(s, r); s and r are the seconds to sample and to score an image. What sampling alone
    takes is one phase, and the rest another.
    """
    images, solving = sizes.plan.images, solving_micro_batches(sizes, balancer)
    waiting = images * times.scoring
    if sizes.overlap:
        beyond = max(times.scoring - times.sampling, 0.0)
        waiting = images * beyond + min(sizes.sampling_batch, images) * min(times.sampling, times.scoring)
    return {
        "loading": times.loading,
        "encoding": sizes.rounds * times.encoding,
        "sampling": sizes.rounds * images * times.sampling,
        "scoring": sizes.rounds * waiting,
        "plain": (sizes.rounds * sizes.plan.total - solving) * times.plain,
        "solving": solving * times.solving,
        "held_out": sizes.held_out * times.held_out,
        "saving": sizes.checkpoints * times.saving,
    }
