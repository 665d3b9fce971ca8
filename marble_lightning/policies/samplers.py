"""Samplers on the policy's flow grid, as diffusers schedulers."""

from __future__ import annotations

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

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **options: Any) -> None:  # type: ignore[override]
        """Set the grid of `num_inference_steps` steps, with one network evaluation each."""
        super().set_timesteps(num_inference_steps, device=device, **options)
        self.sigmas = flow_sigmas(self.euler, num_inference_steps)
        self.timesteps = (1000 * self.sigmas[:-1]).to(device)


def flow_sigmas(euler: FlowMatchEulerDiscreteScheduler, steps: int) -> torch.Tensor:
    """Noise levels of the flow grid from 1 to 0, (steps + 1,)."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def scheduler_for(solver: Solver, euler: FlowMatchEulerDiscreteScheduler) -> Any:
    """A new scheduler for the named solver."""
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    return FlowDPMSolver(euler)
