"""Groups of settings, each checked as soon as it is written down.

Defaults are the SD3.5-Medium run's, but for `Sampling.times_per_image`, which goes with `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, get_args

import torch

from marble_lightning.nft.advantages import AdvantageMode, AdvantageStd
from marble_lightning.policies.samplers import Solver

OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Sampling:
    """How a round's pictures are sampled and which of its flow times are trained on.

    Args:
        steps: Solver steps of a rollout, >= 1.
        solver: `dpm2` (DPM-Solver++ 2M) or `euler`; one network evaluation a step either way.
        batch_size: Pictures sampled at once, >= 1.
        times_per_image: Times of the rollout that each picture is trained on, its own, drawn anew each round; null takes
            all. The published run takes 24 of 25 (its `timestep_fraction` of 0.99).
        noisiest_fraction: Share (0, 1] of the rollout's times, from the noisiest, that are drawn from.
    """

    steps: int = 25
    solver: Solver = "dpm2"
    batch_size: int = 9
    times_per_image: int | None = None
    noisiest_fraction: float = 1.0

    def __post_init__(self) -> None:
        must(self.steps >= 1, "`sampling.steps` must be >= 1", self.steps)
        must(self.batch_size >= 1, "`sampling.batch_size` must be >= 1", self.batch_size)
        one_of(Solver, "`sampling.solver`", self.solver)
        must(
            0 < self.noisiest_fraction <= 1 and self.usable_times >= 1,
            f"`sampling.noisiest_fraction` must leave 1 to {self.steps} of the times", self.noisiest_fraction,
        )  # fmt: skip
        must(
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
        """Times trained on per picture."""
        return self.usable_times if self.times_per_image is None else self.times_per_image


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored, and what happens where a reward fails.

    Args:
        on_error: `raise` stops the run and names reward, prompt and picture; `skip` leaves the scores it failed to give
            missing, counts them and goes on.
        max_skipped: With `skip`, the share of a round's pictures in [0, 1) that a reward may fail on before the run stops. A
            reward without a single score in a round has failed on all its pictures; infinite advantages count as failures.
        retries: Further attempts where the cause lies outside (connections, time-outs, files), >= 0; not of rewards with
            `retries` of their own.
        time_limit: Seconds that a reward may take for one batch, > 0, with `overlap` only; null for no limit.
        overlap: Whether a batch is scored while the next one is sampled, each reward in a thread of its own. Without it
            rewards that compute on the CPU do not slow down sampling that does too.
        devices: Where a reward runs, by name, e.g. {geneval: cpu}; the others run where the policy does. A numbered device,
            such as cuda:1, is the same one for every process of a machine.
        offload: Whether rewards wait on the CPU between rounds.
    """

    on_error: OnError = "raise"
    max_skipped: float = 0.1
    retries: int = 2
    time_limit: float | None = None
    overlap: bool = True
    devices: dict[str, str] = field(default_factory=dict)
    offload: bool = False

    def __post_init__(self) -> None:
        one_of(OnError, "`scoring.on_error`", self.on_error)
        must(0 <= self.max_skipped < 1, "`scoring.max_skipped` must be in [0, 1)", self.max_skipped)
        must(self.retries >= 0, "`scoring.retries` must be >= 0", self.retries)
        must(
            self.time_limit is None or (self.time_limit > 0 and self.overlap),
            "`scoring.time_limit` must be > 0 seconds, or null, and needs `overlap`",
            f"{self.time_limit} with `overlap` {str(self.overlap).lower()}",
        )
        for name, device in self.devices.items():
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ValueError(
                    f"`scoring.devices` must hold devices like cpu or cuda:1. Found {name}: {device!r}."
                ) from error


@dataclass(frozen=True)
class Objective:
    """The NFT loss.

    Args:
        beta: β > 0, how far the positive and negative policies are from the old one.
        max_advantage: A_max > 0, the advantage at which a sample counts as wholly good.
        advantage_std: Advantages are divided by the standard deviation of the whole `round` or of their `group`.
        advantage_mode: What is learned from: `all`; the better (`positive_only`) or worse (`negative_only`) half of the
            pictures; whether better (`one_only`: 1 or 0); or better or worse (`binary`: the sign).
        kl_weight: Weight >= 0 of the squared distance to the base's velocity; never balanced. With 0 it is not computed.

    Source: DiffusionNFT, arXiv 2509.16117.
    """

    beta: float = 0.1
    max_advantage: float = 5.0
    advantage_std: AdvantageStd = "round"
    advantage_mode: AdvantageMode = "all"
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        one_of(AdvantageStd, "`objective.advantage_std`", self.advantage_std)
        one_of(AdvantageMode, "`objective.advantage_mode`", self.advantage_mode)
        must(0 < self.beta < inf, "`objective.beta` must be > 0 and finite", self.beta)
        must(0 < self.max_advantage < inf, "`objective.max_advantage` must be > 0 and finite", self.max_advantage)
        must(0 <= self.kl_weight < inf, "`objective.kl_weight` must be >= 0 and finite", self.kl_weight)


@dataclass(frozen=True)
class Averaging:
    """How the other two adapters follow the trained one. For a schedule of your own, subclass it and override `old_decay`.

    DiffusionNFT's runs: `old_rate` 0.001 and `old_cap` 0.5; 0 and 0 for on-policy; 0.0075, `old_start` 75 and 0.999 for its
    OCR run. MARBLE's release: 0.001 and 0.95.

    Args:
        old_rate: After optimizer step s the old adapter keeps min(old_rate * (s - old_start), old_cap) of itself, >= 0.
        old_start: Optimizer step before which the old adapter is a plain copy.
        old_cap: The cap, in [0, 1).
        ema_decay: Decay per optimizer step of the averaged adapter, in [0, 1).
        ema_warmup: Whether the decay after optimizer step s is at most (1 + s) / (10 + s), as in the release: the average
            then forgets the adapter's start sooner.

    Source: DiffusionNFT, arXiv 2509.16117, and its released code; MARBLE, arXiv 2605.06507, and its.
    """

    old_rate: float = 0.001
    old_start: int = 0
    old_cap: float = 0.95
    ema_decay: float = 0.9
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        must(0 <= self.old_rate < inf, "`averaging.old_rate` must be >= 0 and finite", self.old_rate)
        must(self.old_start >= 0, "`averaging.old_start` must be >= 0", self.old_start)
        must(0 <= self.old_cap < 1, "`averaging.old_cap` must be in [0, 1)", self.old_cap)
        must(0 <= self.ema_decay < 1, "`averaging.ema_decay` must be in [0, 1)", self.ema_decay)

    def old_decay(self, step: int) -> float:
        """What the old adapter keeps of itself after optimizer step `step`, in [0, 1]."""
        return min(self.old_rate * max(step - self.old_start, 0), self.old_cap)

    def averaged_decay(self, step: int) -> float:
        """What the averaged adapter keeps of itself after optimizer step `step`, in [0, 1].

        >>> Averaging(ema_warmup=True).averaged_decay(1), Averaging(ema_warmup=True).averaged_decay(1000)
        (0.18181818181818182, 0.9)
        """
        return min((1 + step) / (10 + step), self.ema_decay) if self.ema_warmup else self.ema_decay


@dataclass(frozen=True)
class Evaluation:
    """How held-out prompts, and those of `predict`, are sampled.

    Args:
        steps: Solver steps, >= 1.
        solver: `euler` or `dpm2`.
        guidance: Classifier-free guidance scale, >= 1; 1 is none.
        resolution: Side of the pictures in pixels, a multiple of 16; null for the policy's.
        seed: Seed >= 0 of the noise; null for the run's. Runs of several seeds can be compared where theirs is the same.
    """

    steps: int = 40
    solver: Solver = "euler"
    guidance: float = 1.0
    resolution: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        must(self.steps >= 1, "`evaluation.steps` must be >= 1", self.steps)
        one_of(Solver, "`evaluation.solver`", self.solver)
        must(1 <= self.guidance < inf, "`evaluation.guidance` must be >= 1 and finite", self.guidance)
        must(
            self.resolution is None or (self.resolution >= 16 and self.resolution % 16 == 0),
            "`evaluation.resolution` must be a positive multiple of 16, or null", self.resolution,
        )  # fmt: skip
        must(self.seed is None or self.seed >= 0, "`evaluation.seed` must be >= 0, or null", self.seed)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """AdamW with the published settings."""
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)


def must(holds: bool, what: str, found: object) -> None:
    """Refuse a value by its name.

    Raises:
        ValueError: It does not hold; with what must, and what was found.
    """
    if not holds:
        raise ValueError(f"{what}. Found {found}.")


def one_of(choices: Any, name: str, found: str) -> None:
    """Refuse a value that is none of a Literal's."""
    must(found in get_args(choices), f"{name} must be one of {', '.join(get_args(choices))}", repr(found))
