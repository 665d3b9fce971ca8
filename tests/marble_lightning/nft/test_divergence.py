"""Diverged training raises `Diverged` and keeps an earlier checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch.amp import GradScaler

from balancers import WeightedSum
from marble_lightning.checkpoints.content import is_usable
from marble_lightning.cli import main
from marble_lightning.command_line import QUIET
from marble_lightning.nft.divergence import Diverged, Finite
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.command_line import fit_with, last, options, state
from tests.helpers.small_runs import run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class TwoRanks:
    """A strategy with another rank, which has recorded `other` values that are not finite."""

    root_device = torch.device("cpu")

    def __init__(self, other: float = 0.0) -> None:
        self.other = other

    def reduce(self, flag, reduce_op):
        assert reduce_op == "sum"
        return flag + self.other


@pytest.mark.integration
@pytest.mark.parametrize(("steps", "left", "rounds"), [(2, "before_round_0000", 0), (1, "round_0000", 1)])
def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(checkpoints, tmp_path, caplog, steps, left, rounds):
    """Also if adapters are still finite after a round's last step, but the images that they sample are not."""
    explodes = {"model.lr_scheduler.gamma": 1e30, "model.optimizer_steps_per_round": steps}
    with pytest.raises(Diverged, match=r"Training has diverged.* optimizer step 2\. Lower the learning rate"):
        fit_with(options(checkpoints, tmp_path, **explodes))
    file = last(tmp_path).resolve()
    assert file.stem == left and is_usable(file) and state(file)["global_step"] == rounds * steps
    assert f"Stopped after {rounds} complete round(s). Resume from there: --ckpt_path {file}" in caplog.text
    assert all(is_usable(each) for each in file.parent.glob("*.ckpt"))


def test_non_finite_images_raise_diverged_and_no_reward_error(checkpoints, tmp_path, monkeypatch):
    decode = SD3Policy.decode
    monkeypatch.setattr(SD3Policy, "decode", lambda self, latents: decode(self, latents) * torch.nan)
    with pytest.raises(Diverged, match=r"images must be finite. Found others. .*choose another `model\.policy\.dtype`"):
        run(checkpoints, tmp_path, WeightedSum())


def test_non_finite_predicted_images_are_not_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(SD3Policy, "decode", lambda self, latents: torch.full((len(latents), 3, 16, 16), torch.nan))
    folder = ["--predictions.folder", str(tmp_path / "out"), "--predictions.scores", "false"]
    with pytest.raises(Diverged, match="images must be finite"):
        main(["predict", *small, *folder])
    assert not list(tmp_path.glob("out/*"))


def test_all_ranks_stop_if_one_has_diverged():
    finite = Finite()
    finite.note(torch.ones(2))
    finite.check_step(TwoRanks(), 1, None)
    with pytest.raises(Diverged, match="in optimizer step 2"):
        finite.check_step(TwoRanks(other=1.0), 2, None)
    finite.note(torch.ones(2), torch.tensor(torch.inf), torch.ones(2))
    with pytest.raises(Diverged, match="in optimizer step 3"):
        finite.check_step(TwoRanks(), 3, None)
    finite.check_step(TwoRanks(), 4, None)  # a check resets the flag


def test_a_too_small_loss_scale_is_divergence():
    Finite().check_step(TwoRanks(), 1, GradScaler("cpu", init_scale=1.0))
    with pytest.raises(Diverged, match=r"finite at some scale of the loss. Found others down to 6e-05, in optimizer step 9"):
        Finite().check_step(TwoRanks(), 9, GradScaler("cpu", init_scale=2.0**-14))
