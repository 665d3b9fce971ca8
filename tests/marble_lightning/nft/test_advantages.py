"""Advantages, compared with values by hand, with missing rewards."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.nft.advantages import apply_advantage_mode, group_advantages

NAN = torch.nan


def test_by_hand_with_missing_values():
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [10.0, 2.0], [14.0, 4.0], [12.0, NAN]])
    groups = torch.tensor([0, 0, 1, 1, 1])
    advantages = group_advantages(rewards, groups)
    # Reward 0: group means 2 and 12; the round's mean is 8, its variance (49 + 25 + 4 + 36 + 16) / 5 = 26.
    first = torch.tensor([-1.0, 1.0, -2.0, 2.0, 0.0]) / (26**0.5 + 1e-4)
    torch.testing.assert_close(advantages[:, 0], first)
    # Reward 1: two valid samples, mean 3, deviation 1.
    second = torch.tensor([NAN, NAN, -1.0, 1.0, NAN]) / (1 + 1e-4)
    torch.testing.assert_close(advantages[:, 1], second, equal_nan=True)


def test_group_deviation_by_hand():
    rewards = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), std="group")
    expected = torch.tensor([[-1 / 1.0001], [1 / 1.0001], [-10 / 10.0001], [10 / 10.0001]])
    torch.testing.assert_close(advantages, expected)


def test_order_of_samples_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(12, 3, generator=generator), torch.arange(12) % 4
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(group_advantages(rewards, groups)[order], group_advantages(rewards[order], groups[order]))


def test_scale_and_shift_of_a_reward_do_not_matter():
    rewards, groups = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    torch.testing.assert_close(
        group_advantages(5000 * rewards + 7, groups), group_advantages(5000 * rewards, groups), atol=2e-3, rtol=0
    )


def test_a_constant_reward_has_no_advantage():
    assert group_advantages(torch.full((4, 1), 0.3), torch.tensor([0, 0, 1, 1])).abs().max() == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [-3.0, 0.0, 2.0]),
        ("positive_only", [0.0, 0.0, 2.0]),
        ("negative_only", [-3.0, 0.0, 0.0]),
        ("one_only", [0.0, 0.0, 1.0]),
        ("binary", [-1.0, 0.0, 1.0]),
    ],
)
def test_advantage_modes_keep_nan(mode, expected):
    advantages = apply_advantage_mode(torch.tensor([[-3.0], [0.0], [2.0], [NAN]]), mode)
    torch.testing.assert_close(advantages[:, 0], torch.tensor([*expected, NAN]), equal_nan=True)
