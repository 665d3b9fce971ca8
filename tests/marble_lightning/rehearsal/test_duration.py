"""The hours of a run: every phase as often as the run goes through it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from balancers import MARBLE, Balancer, WeightedSum
from marble_lightning.nft.rollout import Plan
from marble_lightning.rehearsal.duration import Times, phases
from marble_lightning.rehearsal.sizes import RunSizes

SIZES = RunSizes(
    rounds=7, plan=Plan(24, 2, 4, 2, 2), sampling_batch=8, overlap=False, held_out=30, checkpoints=4
)  # 28 optimizer steps of 6 micro-batches
TIMES = Times(loading=9, encoding=0.5, sampling=2, scoring=3, plain=5, solving=7, held_out=11, saving=13)


def bound(balancer: Balancer) -> Balancer:
    balancer.bind(("a", "b"))
    return balancer


@pytest.mark.parametrize(
    "options",
    [{"refresh_every": 5}, {"refresh_every": 1, "estimate_share": 0.5}, {"refresh_every": 3, "uniform_after_step": 10}],
)
def test_micro_batches_that_solve_are_counted(options):
    found = phases(SIZES, TIMES, bound(MARBLE(**options)))
    steps = [step for step in range(28) if step % options["refresh_every"] == 0]
    number = sum(step < options.get("uniform_after_step", 28) for step in steps) * (3 if "estimate_share" in options else 6)
    assert (found["solving"], found["plain"]) == (number * 7, (28 * 6 - number) * 5)


def test_every_phase_is_counted_as_often_as_a_run_has_it():
    assert phases(SIZES, TIMES, bound(WeightedSum())) == {
        "loading": 9,
        "encoding": 3.5,
        "sampling": 7 * 24 * 2,
        "scoring": 7 * 24 * 3,
        "plain": 28 * 6 * 5,
        "solving": 0,
        "held_out": 330,
        "saving": 52,
    }


@pytest.mark.parametrize("scoring", [1, 3])
def test_scoring_beside_sampling(scoring):
    """Batch by batch: one is sampled while the one before is scored, and the last one is waited for."""
    sampled = scored = 0
    for _ in range(24 // 8):
        sampled += 8 * 2
        scored = max(sampled, scored) + 8 * scoring
    found = phases(replace(SIZES, overlap=True), replace(TIMES, scoring=scoring), bound(WeightedSum()))
    assert found["sampling"] + found["scoring"] == 7 * scored
