"""Samplers on the policy's own flow grid, as stock diffusers schedulers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

Solver = Literal["dpm2", "euler"]


class FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ of second order for velocities, on the sigma grid of the flow-matching Euler scheduler.

    The stock scheduler has the right updates but lays out its own flow grid; the published runs step on the Euler grid.

    Source: DiffusionNFT, arXiv 2509.16117 ("dpm2" rollouts).

    Args:
        euler: The checkpoint's scheduler, whose grid is used.
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
        """Lay out `num_inference_steps` steps; one network evaluation each."""
        super().set_timesteps(num_inference_steps, device=device, **options)
        self.sigmas = flow_sigmas(self.euler, num_inference_steps)
        self.timesteps = (1000 * self.sigmas[:-1]).to(device)


def flow_sigmas(euler: FlowMatchEulerDiscreteScheduler, steps: int) -> torch.Tensor:
    """Noise levels of the flow grid from 1 to 0, (steps + 1,)."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def scheduler_for(solver: Solver, euler: FlowMatchEulerDiscreteScheduler) -> Any:
    """A fresh scheduler of the named solver."""
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler.from_config(euler.config)
    return FlowDPMSolver(euler)
