"""A custom reward and a custom balancer, each a short file outside the project, named in YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marble_lightning.cli import main

REWARD = '''
from rewards import Reward


class Warmth(Reward):
    """Red minus blue."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def score(self, *, images, prompts):
        return self.gain * (images[:, 0] - images[:, 2]).mean((1, 2))
'''

BALANCER = '''
import pytest
import torch
from balancers import Balancer


class InverseNorm(Balancer):
    """Each reward in inverse proportion to the length of its gradient."""

    def weights(self, gram):
        inverse = 1 / gram.diagonal().sqrt()
        return inverse / inverse.sum()
'''

SCHEDULE = '''
from dataclasses import dataclass

from marble_lightning import Averaging


@dataclass(frozen=True)
class Halfway(Averaging):
    """From step `since` on the old adapter copies the trained one; before, it does not change."""

    since: int = 2

    def old_decay(self, step):
        return 0.0 if step >= self.since else 1.0
'''

CONFIG = """
balancer:
  class_path: my_balancer.InverseNorm
  init_args: {refresh_every: 2, ema_decay: 0.5}
model:
  rewards:
    warmth:
      class_path: my_reward.Warmth
      init_args: {gain: 2.0}
    brightness:
      class_path: my_reward.Warmth
      init_args: {gain: -1.0}
"""


@pytest.mark.integration
def test_custom_reward_and_balancer_train(small, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "my_balancer.py").write_text(BALANCER)
    config = Path(tmp_path / "my.yaml")
    config.write_text(CONFIG)
    assert max(len(text.strip().splitlines()) for text in (REWARD, BALANCER)) <= 15
    monkeypatch.syspath_prepend(tmp_path)
    main(["fit", *_without_rewards(small), "-c", str(config)])
    saved = torch.load(tmp_path / "tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["InverseNorm"]["reward_names"] == ["warmth", "brightness"]
    assert saved["callbacks"]["InverseNorm"]["step"] == 2
    trained = [tensor for name, tensor in saved["state_dict"].items() if ".lora_B.trained" in name]
    assert max(tensor.abs().max() for tensor in trained) > 0


def _without_rewards(options: list[str]) -> list[str]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for name, value in pairs if not name.startswith("--model.rewards") for part in (name, value)]


def test_the_command_line_adds_a_custom_reward(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_reward.py").write_text(REWARD)
    (tmp_path / "my_balancer.py").write_text(BALANCER)
    monkeypatch.syspath_prepend(tmp_path)
    custom = ["--model.rewards.warmth", "my_reward.Warmth", "--balancer", "my_balancer.InverseNorm"]
    with pytest.raises(SystemExit):
        main(["fit", *small, *custom, "--balancer.refresh_every", "5", "--print_config"])
    shown = capsys.readouterr().out
    assert "class_path: my_balancer.InverseNorm" in shown
    assert all(f"    {name}:" in shown for name in ("pickscore", "hpsv2", "clipscore", "ocr", "geneval", "warmth"))


@pytest.mark.integration
def test_a_custom_schedule_updates_the_old_adapter(small, tmp_path, monkeypatch):
    (tmp_path / "my_schedule.py").write_text(SCHEDULE)
    monkeypatch.syspath_prepend(tmp_path)
    cheap = ["--model.rewards", "{jpeg: JPEGCompressibility}", "--model.metrics", "{}"]
    cheap += ["--trainer.limit_val_batches", "0", "--data.prompts_per_round", "3"]
    for since in (2, 3):
        schedule = ["--model.averaging", "my_schedule.Halfway", "--model.averaging.since", str(since)]
        main(["fit", *_without_rewards(small), *schedule, *cheap])
        saved = torch.load(tmp_path / f"tiny/version_{since - 2}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        names = [name for name in saved if ".lora_B.trained" in name]
        copied = [torch.equal(saved[name.replace(".trained.", ".old.")], saved[name]) for name in names]
        assert all(copied) == (since == 2)
