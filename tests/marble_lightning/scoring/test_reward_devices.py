"""Devices of rewards, and offloading between rounds."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.module import DiffusionNFT
from marble_lightning.policies.sd3 import SD3Policy
from marble_lightning.scoring.scorer import Scorer
from marble_lightning.scoring.settings import Scoring
from tests.helpers.scored_images import PROMPTS
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


def test_offloaded_rewards_keep_their_weights_on_the_cpu():
    """On the device `meta` they have no data; afterwards they have the same tensors again, also a shared model."""
    one, other = Brightness(), Brightness()
    one.tower = other.tower = torch.nn.Linear(1, 1).requires_grad_(False)
    address = one.tower.weight.data_ptr()
    scorer = Scorer({"one": one, "other": other}, Scoring(devices={"one": "meta", "other": "meta"}, offload=True))
    for _ in range(2):
        with torch.inference_mode():  # as in validation
            scorer._place(torch.device("cpu"))
        assert not one.tower.weight.is_inference()
        assert one.tower.weight.device.type == other.tower.weight.device.type == "meta"
        scorer.release()
        assert one.tower.weight.data_ptr() == address and one.tower.weight is other.tower.weight


def test_a_reward_elsewhere_never_touches_the_policys_device(checkpoints):
    """The policy is on `meta`: neither its move nor scoring brings the reward's weights there, and inputs go past it."""

    class Weighted(Brightness):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

        def to(self, device):
            self.seen.append(f"moved to {device}")
            return super().to(device)

        def forward(self, *, images, prompts):
            self.seen.append(f"images on {images.device}")
            return torch.zeros(len(images), device=images.device)

    here, elsewhere = Weighted(), Weighted()
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2)
    scoring = Scoring(devices={"elsewhere": "meta"})
    module = DiffusionNFT(policy, {"here": here}, {"elsewhere": elsewhere}, scoring=scoring)
    module.to("meta")
    assert here.weight.device.type == elsewhere.weight.device.type == "cpu" and here.seen == elsewhere.seen == []
    module.scorer.submit(torch.zeros(2, 3, 4, 4), PROMPTS[:2], ["elsewhere"])
    module.scorer._jobs[0].future.result()
    assert elsewhere.seen == ["moved to meta", "images on meta"] and here.seen == ["moved to cpu"]
    assert "elsewhere" not in str(module.state_dict().keys())


def test_a_device_without_a_number_is_the_policys():
    """With the first device instead, all processes of a machine would share it."""
    bright = Brightness()
    scorer = Scorer({"same": bright, "third": bright, "host": bright}, Scoring(devices={"third": "cuda:3", "host": "cpu"}))
    devices = [str(scorer._device_of(name, torch.device("cuda", 5))) for name in ("same", "third", "host")]
    assert devices == ["cuda:5", "cuda:3", "cpu"]
    unnumbered = Scorer({"same": bright}, Scoring(devices={"same": "cuda"}))
    assert unnumbered._device_of("same", torch.device("cuda", 5)) == torch.device("cuda", 5)
    assert unnumbered._device_of("same", torch.device("cpu")) == torch.device("cuda")
