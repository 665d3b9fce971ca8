"""Samplers on the policy's flow grid, as diffusers schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

Solver = Literal["dpm2", "euler"]


class FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ of second order for velocities, on the sigma grid of the flow-matching Euler scheduler.

    The stock scheduler has the same updates but another flow grid; the published runs use the Euler grid.

    Args:
        euler: The checkpoint's scheduler; its grid is used.

    Source: DiffusionNFT, arXiv 2509.16117 ("dpm2" rollouts).
    """

    def __init__(self, euler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__(
            algorithm_type="dpmsolver++",
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=euler.config.shift,
        )
        self.euler = euler

    def set_timesteps(  # type: ignore[override]
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the grid, with one network evaluation each step.

        Args:
            num_inference_steps: Number of steps; None if `sigmas` are given.
            device: Device of the timesteps.
            sigmas: Noise levels before the checkpoint's shift, in descending order; None for the Euler scheduler's own.
            mu: Without effect, as in the Euler scheduler: it is for a shift that depends on the size of the images.
        """
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        super().set_timesteps(steps, device=device)
        self.sigmas = flow_sigmas(self.euler, steps, sigmas)
        self.timesteps = (1000 * self.sigmas[:-1]).to(device)


def flow_sigmas(
    euler: FlowMatchEulerDiscreteScheduler, steps: int | None, sigmas: Sequence[float] | None = None
) -> torch.Tensor:
    """Noise levels of the flow grid from 1 to 0, (steps + 1,).

    Args:
        euler: The checkpoint's scheduler.
        steps: Number of steps; None if `sigmas` are given.
        sigmas: Noise levels before the checkpoint's shift, in descending order; None for the scheduler's own.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    scheduler.set_timesteps(steps, sigmas=sigmas)
    return scheduler.sigmas.cpu()


def scheduler_for(solver: Solver, euler: FlowMatchEulerDiscreteScheduler) -> Any:
    """A new scheduler for the named solver."""
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    return FlowDPMSolver(euler)
