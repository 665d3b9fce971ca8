"""The training step: what it captures on a refresh, and what it leaves behind after an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balancers import MARBLE
from marble_lightning.command_line import QUIET
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.step import TrainingStep
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class FailsOnRefresh(DiffusionNFT):
    """An error in the forward or in the backward pass of the first micro-batch, which is a refresh."""

    where = "forward"

    def on_train_start(self) -> None:
        def fail(*_: Any) -> None:
            assert self.step.per_reward.taps.on
            raise torch.OutOfMemoryError(self.where)

        if self.where == "forward":
            self.step.sample_losses_and_kl = fail  # type: ignore[method-assign]
        else:
            self.trainable[0].register_hook(fail)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_on_a_refresh_leaves_no_capture_behind(checkpoints, tmp_path, monkeypatch, where):
    monkeypatch.setattr(FailsOnRefresh, "where", where)
    before = torch._dynamo.eval_frame._stance.stance
    modules: list[Any] = []
    monkeypatch.setattr(FailsOnRefresh, "on_fit_start", lambda self: modules.append(self))
    with pytest.raises(torch.OutOfMemoryError, match=where):
        run(checkpoints, tmp_path, MARBLE(), kind=FailsOnRefresh)
    assert torch._dynamo.eval_frame._stance.stance == before
    assert not modules[0].step.per_reward.taps.on


def test_only_the_trained_forward_pass_of_a_refresh_is_uncompiled(checkpoints, tmp_path, monkeypatch):
    seen, velocity = [], TrainingStep.velocity

    def watched(self, batch, adapter):
        seen.append((adapter, torch._dynamo.eval_frame._stance.stance, self.per_reward.taps.on))
        return velocity(self, batch, adapter)

    monkeypatch.setattr(TrainingStep, "velocity", watched)
    run(checkpoints, tmp_path, MARBLE())
    assert seen[:3] == [("old", "default", False), (None, "default", False), ("trained", "force_eager", True)]
