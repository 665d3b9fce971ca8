"""The KL term: where it is computed, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from balancers import MARBLE, FixedWeights, WeightedSum, min_norm_weights
from marble_lightning.command_line import QUIET
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.rollout import MicroBatch
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Counted(DiffusionNFT):
    """Counts forward passes by adapter, and backward passes through the trained one."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.passes, predict = Counter(), self.step.velocity

        def velocity(batch: MicroBatch, adapter: Any) -> Tensor:
            self.passes[adapter] += 1
            predicted = predict(batch, adapter)
            if predicted.requires_grad:
                predicted.register_hook(lambda _: self.passes.update(["backward"]))
            return predicted

        self.step.velocity = velocity


@pytest.mark.parametrize(("balancer", "backward"), [(WeightedSum, 1), (MARBLE, 2)])
def test_a_kl_term_without_weight_costs_no_passes(checkpoints, tmp_path, balancer, backward):
    """No forward pass of the base, and no third backward pass on a refresh."""
    options = {} if balancer is WeightedSum else {"refresh_every": 1}
    with_kl, recorded = run(checkpoints, tmp_path, balancer(**options), rounds=2, kind=Counted, kl_weight=1e-9)
    without, recorded_without = run(checkpoints, tmp_path, balancer(**options), rounds=2, kind=Counted, kl_weight=0.0)
    n, old = without.passes["trained"], without.passes["trained"] + 2  # one per round checks that the last step is finite
    assert without.passes == {"trained": n, "old": old, "backward": backward * n}
    assert with_kl.passes == {"trained": n, "old": old, None: n, "backward": (backward + (balancer is MARBLE)) * n}
    assert "kl" not in without.trainer.callback_metrics
    for one, other in zip(recorded_without.gradients, recorded.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("balancer", [FixedWeights(), MARBLE(refresh_every=1, ema_decay=0.0)], ids=["plain", "refresh"])
def test_a_kl_term_on_one_of_two_micro_batches(checkpoints, tmp_path, balancer):
    """Twice the mean over the chosen half stands for the mean over all four; the next step chooses the other half."""
    module, recorded = run(checkpoints, tmp_path, balancer, rounds=2, kind=Counted, kl_weight=0.5, kl_every=2)
    assert 2 * module.passes[None] == module.passes["trained"] == 2 * 4
    for step in range(2):
        gradients, _ = reference(module, recorded, step)
        recorded.batches[step] = recorded.batches[step][step::2]
        _, kl = reference(module, recorded, step)
        if isinstance(balancer, MARBLE):
            norms = gradients.norm(dim=1)
            unit = gradients / norms[:, None]
            merged = min_norm_weights(unit.double() @ unit.double().T).float() @ unit * norms.mean()
        else:
            merged = gradients.mean(0)
        torch.testing.assert_close(recorded.gradients[step], merged + 0.5 * kl, rtol=1e-3, atol=1e-6)


class Repeated(DiffusionNFT):
    """Trains on the first micro-batch of a round only, as often as it has micro-batches."""

    def split_round(self, *arguments: Any) -> Iterator[MicroBatch]:
        yield from [next(super().split_round(*arguments))] * self.plan.total


def test_fewer_kl_terms_of_equal_micro_batches_have_the_same_gradient(checkpoints, tmp_path):
    def gradient(every: int, weight: float = 5.0) -> Tensor:
        options = {"kind": Repeated, "kl_weight": weight, "kl_every": every}
        return run(checkpoints, tmp_path, WeightedSum(), rounds=2, **options)[1].gradients[1]

    full, without = gradient(1), gradient(1, weight=0.0)
    assert (full - without).norm() > 1e-3 * full.norm(), "the KL term is too small for the comparison"
    for every in (2, 4):
        torch.testing.assert_close(gradient(every), full, rtol=1e-4, atol=1e-7)
