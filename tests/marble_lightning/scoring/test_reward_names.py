"""Names of rewards."""

from __future__ import annotations

import pytest

from marble_lightning.command_line import command_line
from marble_lightning.scoring.reward_names import named_rewards
from rewards import JPEGCompressibility


def test_null_rewards_are_left_out():
    reward = JPEGCompressibility()
    assert named_rewards("rewards", {"a": reward, "b": None, "c-2_x": reward}) == {"a": reward, "c-2_x": reward}


@pytest.mark.parametrize("name", ["a.b", "a/b", "a b", "", "1", "_a", "é", 1])
def test_names_that_files_or_curves_cannot_have(name):
    with pytest.raises(ValueError, match=f"Names in `metrics` must be letters, .* Found {name!r}"):
        named_rewards("metrics", {name: JPEGCompressibility()})


@pytest.mark.parametrize("setting", ["rewards", "metrics"])
def test_the_command_line_refuses_wrong_names(setting):
    with pytest.raises(ValueError, match=f"Names in `{setting}` must be letters"):
        command_line(["-c", "tiny", f"--model.{setting}.1st", "JPEGCompressibility"], run=False)


def test_at_least_one_reward_must_remain():
    rewards = [f"--model.rewards.{name}=null" for name in ("pickscore", "hpsv2", "clipscore", "ocr", "geneval")]
    with pytest.raises(ValueError, match="`rewards` must name at least one reward"):
        command_line(["-c", "tiny", *rewards], run=False)
