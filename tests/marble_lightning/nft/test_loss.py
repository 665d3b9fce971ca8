"""The NFT loss, compared with autograd of the plain formula, and mixtures of rewards as weighted sums."""

from __future__ import annotations

import pytest
import torch

from marble_lightning.nft.loss import Coefficients, Objective, add_noise, coefficients, nft_losses

BETA, A_MAX = 0.3, 5.0


def draws(batch: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, 3, 3)
    names = ("velocity", "old_velocity", "noise", "clean")
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name in names}
    drawn["t"] = torch.rand(batch, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    return drawn


def plain_loss(velocity, old_velocity, noisy, clean, t, advantage) -> torch.Tensor:
    """The published loss of one reward, computed sample by sample."""
    total = velocity.new_zeros(())
    n = int((~advantage.isnan()).sum())
    for i in range(len(t)):
        if advantage[i].isnan():
            continue
        r = min(max(0.5 + float(advantage[i]) / (2 * A_MAX), 0.0), 1.0)
        for share, sign in ((r, 1.0), (1 - r, -1.0)):
            mixed = (1 - sign * BETA) * old_velocity[i] + sign * BETA * velocity[i]
            error = noisy[i] - t[i] * mixed - clean[i]
            scale = max(float(error.detach().abs().mean()), 1e-5)
            total = total + (A_MAX / BETA) * share * (error**2).mean() / scale / n
    return total


def test_autocast_does_not_round_the_losses_of_rewards():
    generator = torch.Generator().manual_seed(0)
    plus, minus = torch.rand(2, 9, 5, generator=generator)
    sample_losses = torch.rand(2, 9, generator=generator) * 5
    with torch.autocast("cpu", torch.bfloat16):
        losses = Coefficients(plus, minus).losses(*sample_losses)
    torch.testing.assert_close(losses, plus.T @ sample_losses[0] + minus.T @ sample_losses[1], rtol=1e-6, atol=0)


def test_one_of_kl_every_micro_batches_has_a_kl_term_and_each_has_its_turn():
    objective = Objective(kl_every=3)
    steps = torch.tensor([[objective.has_kl(step, index) for index in range(6)] for step in range(3)])
    assert (steps.sum(1) == 2).all() and (steps.sum(0) == 1).all()
    assert all(Objective().has_kl(step, index) for step in range(2) for index in range(2))
    assert not Objective(kl_weight=0, kl_every=2).has_kl(0, 0)


def test_noised_is_linear_in_time():
    drawn = draws()
    noisy = add_noise(drawn["clean"], drawn["noise"], torch.tensor([0.0, 1.0, 0.25, 0.5, 0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(noisy[0], drawn["clean"][0])
    torch.testing.assert_close(noisy[1], drawn["noise"][1])
    torch.testing.assert_close(noisy[2], 0.75 * drawn["clean"][2] + 0.25 * drawn["noise"][2])


@pytest.mark.parametrize("extreme", [1.0, 4.0])
def test_every_mixture_of_rewards_is_one_weighted_sum(extreme):
    """Loss and gradient for any weights, with clamped advantages (|A| > A_max if extreme) and missing rewards."""
    drawn = draws()
    advantages = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * extreme * 2
    advantages[:3, 1] = torch.nan
    advantages[1:, 3] = torch.nan
    weights = torch.tensor([0.7, -1.3, 0.0, 2.5], dtype=torch.float64)
    noisy = add_noise(drawn["clean"], drawn["noise"], drawn["t"])
    velocity = drawn["velocity"].requires_grad_()

    plain = sum(
        w * plain_loss(velocity, drawn["old_velocity"], noisy, drawn["clean"], drawn["t"], column)
        for w, column in zip(weights, advantages.T, strict=True)
    )
    (expected,) = torch.autograd.grad(plain, velocity)

    counts = (~advantages.isnan()).sum(0)
    plus, minus = nft_losses(velocity, drawn["old_velocity"], noisy, drawn["clean"], drawn["t"], BETA)
    merged = weights @ coefficients(advantages, counts, BETA, A_MAX).losses(plus, minus)
    (gradient,) = torch.autograd.grad(merged, velocity)

    torch.testing.assert_close(merged, plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_missing_rewards_have_zero_coefficients():
    advantages = torch.tensor([[torch.nan, 0.0], [1.0, torch.nan]])
    plus, minus = coefficients(advantages, torch.tensor([1, 1]), BETA, A_MAX)
    assert plus[0, 0] == minus[0, 0] == plus[1, 1] == minus[1, 1] == 0
    torch.testing.assert_close(plus[0, 1], minus[0, 1])
    torch.testing.assert_close(plus[1, 0] + minus[1, 0], torch.tensor(A_MAX / BETA))


def test_the_loss_of_a_perfect_prediction_is_zero():
    zero = torch.zeros(1, 1, 2, 2)
    plus, minus = nft_losses(zero, zero, zero, zero, torch.tensor([0.5]), BETA)
    assert plus.item() == minus.item() == 0.0
