"""Balancers that use the scores of each round, in training: once a round, and the same after a resume."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from balancers import OutcomeGuard, Sequential, WeightedSum
from balancers.spread import squared_deviations
from marble_lightning.callbacks.alignment_probe import probe
from marble_lightning.command_line import QUIET
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Probing(Callback):
    """Probes every step, also on fresh images, and keeps each round's figures and scores."""

    def __init__(self) -> None:
        self.figures, self.totals = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        probe(pl_module, trainer.global_step)
        self.figures.append(pl_module.round_metrics)
        self.totals.append(squared_deviations(pl_module.scores, pl_module.rollout.groups))


class Saving(Callback):
    """Saves a checkpoint after a round."""

    def __init__(self, file) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.file)


def test_a_round_counts_once_whatever_probes_do(checkpoints, tmp_path):
    probing, balancer = Probing(), WeightedSum("std")
    run(checkpoints, tmp_path, balancer, rounds=2, callbacks=[probing])
    torch.testing.assert_close(balancer.memory["totals"], sum(probing.totals))
    assert probing.figures[-1]["reward_weight/red"] == balancer.reward_weights[1].item()


@pytest.mark.parametrize(
    "kind", [lambda: WeightedSum("std"), lambda: Sequential(1), lambda: OutcomeGuard(window=1, rate=5.0)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(checkpoints, tmp_path, kind):
    whole = run(checkpoints, tmp_path, kind(), rounds=3, callbacks=[Saving(tmp_path / "round.ckpt")])[0]
    resumed = run(checkpoints, tmp_path, kind(), rounds=3, ckpt_path=tmp_path / "round.ckpt")[0]
    for parameter, expected in zip(resumed.trainable, whole.trainable, strict=True):
        assert torch.equal(parameter, expected)
    assert resumed.balancer.loss_weights.equal(whole.balancer.loss_weights)
    if isinstance(whole.balancer, Sequential):
        assert resumed.balancer.current == "contrast"
