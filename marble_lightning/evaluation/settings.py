"""Settings of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from marble_lightning.policies.samplers import Solver
from marble_lightning.utils.validation import require, require_one_of


@dataclass(frozen=True)
class Evaluation:
    """How held-out prompts and the prompts of `predict` are sampled.

    Args:
        steps: Solver steps, >= 1.
        solver: `euler` or `dpm2`.
        guidance: Classifier-free guidance scale, >= 1; 1 disables guidance.
        resolution: Side of the images in pixels, a multiple of 16; null for the policy's.
        seed: Seed of the noise, >= 0; null for the run's. Set it to compare runs with different seeds.
    """

    steps: int = 40
    solver: Solver = "euler"
    guidance: float = 1.0
    resolution: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 1, "`evaluation.steps` must be >= 1", self.steps)
        require_one_of(Solver, "`evaluation.solver`", self.solver)
        require(1 <= self.guidance < inf, "`evaluation.guidance` must be >= 1 and finite", self.guidance)
        require(
            self.resolution is None or (self.resolution >= 16 and self.resolution % 16 == 0),
            "`evaluation.resolution` must be a positive multiple of 16, or null", self.resolution,
        )  # fmt: skip
        require(self.seed is None or self.seed >= 0, "`evaluation.seed` must be >= 0, or null", self.seed)
