"""Rewards whose gradients are zero, tiny or not finite."""

from __future__ import annotations

import logging

import pytest
import torch

from balancers import MARBLE
from tests.helpers.command_line import differences
from tests.helpers.small_balancers import NAMES, Scripted, bound, gradients_of, step


@pytest.mark.parametrize("factor", [0.0, torch.nan, torch.inf])
def test_an_inactive_reward_keeps_its_coefficient(factor):
    balancer = bound(Scripted([0.2, 0.3, 0.5], [0.4, 0.6], ema_decay=0.5, normalize=True))
    step(balancer, torch.eye(3))
    gradients = torch.eye(3)
    gradients[1] *= factor
    merged, coefficients = step(balancer, gradients)
    assert balancer.grams[1].shape == (2, 2)
    assert balancer.diagnostics["left_out"] == {"ocr": "zero" if factor == 0 else "not finite"}
    assert balancer.diagnostics["alpha_age"].tolist() == [0, 1, 0]
    torch.testing.assert_close(coefficients, torch.tensor([0.3, 0.3, 0.55]))
    torch.testing.assert_close(merged, torch.tensor([0.3, 0.0, 0.55]))


def test_a_reward_that_was_never_active_has_the_prior():
    balancer = bound(Scripted([0.4, 0.6], normalize=True))
    _, coefficients = step(balancer, torch.diag(torch.tensor([1.0, 0.0, 1.0])))
    torch.testing.assert_close(coefficients, torch.tensor([0.4, 1 / 3, 0.6]))


def test_an_inactive_reward_with_all_the_weight_does_not_zero_the_update():
    balancer = bound(Scripted([1.0, 0.0], [1.0]), ("a", "b"))
    step(balancer, torch.eye(2))
    merged, _ = step(balancer, torch.diag(torch.tensor([0.0, 2.0])))
    torch.testing.assert_close(merged, torch.tensor([0.0, 2.0]))


def test_without_active_rewards_nothing_changes_and_the_next_step_solves(caplog):
    balancer = bound(MARBLE(refresh_every=10))
    with caplog.at_level(logging.WARNING):
        merged, coefficients = step(balancer, torch.zeros(3, 4))
    assert "No reward has a finite, non-zero gradient at optimizer step 0" in caplog.text
    assert merged.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(coefficients, torch.full((3,), 1 / 3))
    assert balancer.diagnostics["left_out"] == dict.fromkeys(NAMES, "zero")
    assert step(balancer, torch.eye(3))[0] is not None
    assert balancer.counts["refreshes"] == 1


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_an_overflow_does_not_change_the_state(factor):
    """With a loss scaler, which skips the step, also if only one gradient of three overflows."""
    balancer = bound(MARBLE(refresh_every=2))
    step(balancer, gradients_of(0))
    step(balancer, gradients_of(1))
    before, coefficients = balancer.state_dict(), balancer.smoothed.alpha.float()
    gradients = gradients_of(2)
    gradients[1] *= factor
    balancer.begin_step(1)
    balancer.add_gradients(gradients)
    assert not balancer.solve(lambda x: x, loss_scaled=True).any()
    assert balancer.any_gradient_overflowed and not balancer.solved
    assert torch.equal(balancer.loss_weights, coefficients)
    balancer.end_step()
    after = balancer.state_dict()
    assert differences(after, before) == []

    merged, _ = step(balancer, gradients_of(2))  # the same step again, with a smaller loss scale
    assert merged is not None and not balancer.any_gradient_overflowed
    assert balancer.step == before["step"] + 1


def test_without_a_loss_scaler_a_non_finite_gradient_is_no_overflow():
    balancer = bound(MARBLE())
    balancer.begin_step(1)
    balancer.add_gradients(torch.eye(3) * torch.tensor([[1.0], [torch.inf], [1.0]]))
    assert balancer.solve(lambda x: x).norm() > 0
    assert balancer.solved and not balancer.any_gradient_overflowed
