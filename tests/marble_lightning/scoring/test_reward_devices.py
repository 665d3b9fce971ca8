"""Devices of rewards, and offloading between rounds."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from tests.helpers.small_rewards import Brightness


def test_rewards_that_share_a_model_must_share_a_device():
    one, other = Brightness(), Brightness()
    one.tower = other.tower = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match="must put rewards that share a model on one device. Found one on cpu and other on meta"
    ):
        Scorer({"one": one, "other": other}, Scoring(devices={"other": "meta"}))._place(torch.device("cpu"))


def test_devices_and_offloading(tmp_path):
    class RecordedMoves(Brightness):
        def __init__(self):
            super().__init__()
            self.moves = []

        def to(self, device):
            self.moves.append(str(device))
            return self

    one, other = RecordedMoves(), RecordedMoves()
    scorer = Scorer({"one": one, "other": other}, Scoring(devices={"other": "meta"}, offload=True))
    scorer._place(torch.device("cpu"))
    scorer._place(torch.device("cpu"))
    scorer.release()
    assert one.moves == ["cpu", "cpu"] and other.moves == ["meta", "cpu"]


def test_a_device_without_a_number_is_the_policys():
    """With the first device instead, all processes of a machine would share it."""
    bright = Brightness()
    scorer = Scorer({"same": bright, "third": bright, "host": bright}, Scoring(devices={"third": "cuda:3", "host": "cpu"}))
    devices = [str(scorer._device_of(name, torch.device("cuda", 5))) for name in ("same", "third", "host")]
    assert devices == ["cuda:5", "cuda:3", "cpu"]
    unnumbered = Scorer({"same": bright}, Scoring(devices={"same": "cuda"}))
    assert unnumbered._device_of("same", torch.device("cuda", 5)) == torch.device("cuda", 5)
    assert unnumbered._device_of("same", torch.device("cpu")) == torch.device("cuda")
