"""The flow grid and the second-order solver."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from marble_lightning.policies.samplers import FlowDPMSolver


def test_grid_of_the_published_run():
    """25 steps, shift 3: sigma = 3 s / (1 + 2 s) for 25 evenly spaced s from 1 to the shifted 1/1000."""
    smallest = 3 * 0.001 / (1 + 2 * 0.001)
    even = torch.linspace(1, smallest, 25, dtype=torch.float64)
    expected = torch.cat([3 * even / (1 + 2 * even), torch.zeros(1, dtype=torch.float64)])
    solver = FlowDPMSolver(FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver.set_timesteps(25)
    torch.testing.assert_close(solver.sigmas.double(), expected, atol=3e-6, rtol=0)
    torch.testing.assert_close(solver.timesteps.double(), 1000 * expected[:-1], atol=3e-3, rtol=0)


@pytest.mark.parametrize("steps", [4, 8, 25])
def test_a_straight_flow_is_solved_exactly(steps):
    """With a constant clean prediction the velocity is (x - x0) / sigma; a solver of any order must reach x0."""
    clean = torch.tensor([[0.3, -1.2]])
    solver = FlowDPMSolver(FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver.set_timesteps(steps)
    x = torch.tensor([[2.0, 1.0]])
    for sigma, t in zip(solver.sigmas[:-1], solver.timesteps, strict=True):
        x = solver.step((x - clean) / sigma, t, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)


def curved(x: torch.Tensor, sigma: float, deviation: float = 0.4) -> torch.Tensor:
    """Velocity of Gaussian data with a standard deviation of `deviation`."""
    return x * (sigma - (1 - sigma) * deviation**2) / ((1 - sigma) ** 2 * deviation**2 + sigma**2)


@pytest.mark.parametrize("steps", [8, 25])
def test_updates_equal_those_of_dpm_solver_plus_plus_2m(steps):
    """arXiv 2211.01095, algorithm 2, in log-SNR for alpha = 1 - sigma; the first and last step are of first order."""
    solver = FlowDPMSolver(FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver.set_timesteps(steps)
    start = torch.tensor([[1.5, -0.7]])
    x = start.clone()
    for sigma, t in zip(solver.sigmas[:-1], solver.timesteps, strict=True):
        x = solver.step(curved(x, sigma), t, x).prev_sample

    expected, before, step_before = start.double(), None, math.inf
    sigmas = [float(sigma) for sigma in solver.sigmas]
    for index, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        clean = expected - sigma * curved(expected, sigma)
        step = _log_snr(after) - _log_snr(sigma)
        mixed = clean
        if before is not None and index < steps - 1 and step_before < math.inf:
            mixed = clean + step / (2 * step_before) * (clean - before)
        expected = after / sigma * expected - (1 - after) * math.expm1(-step) * mixed
        before, step_before = clean, step
    torch.testing.assert_close(x.double(), expected, atol=2e-5, rtol=0)


def _log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log((1 - sigma) / sigma)
