"""Names of rewards."""

from __future__ import annotations

import pytest
from torch import nn

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


@pytest.mark.parametrize("name", ["type", "train", "forward", "keys", "pop", "float", "training", "T_destination"])
def test_names_of_module_attributes(name):
    with pytest.raises(ValueError, match=f"Names in `rewards` must not be those of .* Found '{name}'; try '{name}_score'"):
        named_rewards("rewards", {name: None})


def test_torch_accepts_every_name_that_is_not_refused():
    for name in [*dir(nn.ModuleDict()), "ocr", "A-b_3"]:
        try:
            named_rewards("rewards", {name: JPEGCompressibility()})
        except ValueError:
            continue
        nn.ModuleDict({name: JPEGCompressibility()})


@pytest.mark.parametrize("setting", ["rewards", "metrics"])
def test_the_command_line_refuses_wrong_names(setting):
    with pytest.raises(ValueError, match=f"Names in `{setting}` must not be"):
        command_line(["-c", "tiny", f"--model.{setting}.train", "JPEGCompressibility"], run=False)


def test_at_least_one_reward_must_remain():
    rewards = [f"--model.rewards.{name}=null" for name in ("pickscore", "hpsv2", "clipscore", "ocr", "geneval")]
    with pytest.raises(ValueError, match="`rewards` must name at least one reward"):
        command_line(["-c", "tiny", *rewards], run=False)
