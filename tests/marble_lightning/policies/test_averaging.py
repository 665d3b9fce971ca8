"""The old adapter follows the trained one, and an old adapter that stays behind is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from balancers import WeightedSum
from marble_lightning.command_line import QUIET
from marble_lightning.policies.averaging import Averaging, old_to_trained
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Adapters:
    """Two adapters of two parameters each; `share` is the part of an update that really happens."""

    def __init__(self, distance: float, share: float = 1.0) -> None:
        self.adapters = {"trained": [torch.ones(2), torch.zeros(2)], "old": [torch.ones(2), torch.tensor([distance, 0.0])]}
        self.share = share

    def parameters_of(self, adapter: str) -> list[torch.Tensor]:
        return self.adapters[adapter]

    def lerp_adapter(self, adapter: str, *, towards: str, by: float) -> None:
        for parameter, goal in zip(self.adapters[adapter], self.adapters[towards], strict=True):
            parameter.lerp_(goal, by * self.share)


def test_the_old_adapter_keeps_the_share_of_its_decay():
    policy: Any = Adapters(distance=0.5)
    assert old_to_trained(policy) == pytest.approx((0.5, 2**0.5))
    Averaging(old_rate=0.1, old_cap=0.5).update_old(policy, step=2)
    assert old_to_trained(policy)[0] == pytest.approx(0.5 * 0.2)


@pytest.mark.parametrize("share", [0.0, -0.5])
def test_an_old_adapter_that_stays_behind_is_an_error(share):
    policy: Any = Adapters(distance=0.5, share=share)
    with pytest.raises(RuntimeError, match=r"no nearer than before, .* of 0\.5, with a decay of 0\.2\. .* of Adapters"):
        Averaging(old_rate=0.1, old_cap=0.5).update_old(policy, step=2)


class Frozen(Averaging):
    def old_decay(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize(("averaging", "distance"), [(Frozen(), 0.5), (Averaging(), 0.0), (Averaging(), 1e-9)])
def test_without_an_update_there_is_no_error(averaging, distance):
    """A schedule that keeps the old adapter, adapters that are equal, and a difference below the rounding of float32."""
    averaging.update_old(Adapters(distance, share=0.0), step=2)


def test_a_run_ends_after_the_first_round_whose_update_is_lost(checkpoints, tmp_path, monkeypatch):
    lerp, rounds = SD3Policy.lerp_adapter, []

    def lost_in_training(self: SD3Policy, adapter: Any, **options: Any) -> None:
        if adapter == "old" and options["by"] < 1:  # not the copy at the start
            rounds.append(options["by"])
        else:
            lerp(self, adapter, **options)

    monkeypatch.setattr(SD3Policy, "lerp_adapter", lost_in_training)
    with pytest.raises(RuntimeError, match=r"The old adapter must move towards the trained one.*of SD3Policy\."):
        run(checkpoints, tmp_path, WeightedSum(), rounds=3)
    assert rounds == [0.5]
