"""Per-reward gradients by two backward passes, compared with one backward pass per reward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marble_lightning.nft.loss import coefficients, nft_losses
from marble_lightning.nft.reward_gradients import (
    LinearTaps,
    RewardGradients,
    add_flat,
    gradients_by_passes,
    product_in_float32,
)
from marble_lightning.policies.sd3 import SD3Policy

SAMPLES = 6


@pytest.fixture
def policy(checkpoints):
    policy = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=3, alpha=6, text_length=4, dtype="float32")
    policy.setup(0)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters_of("trained"):  # B is zero at the start, and the gradient of A would be zero
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def half_clamped(rewards: int):
    """Loss coefficients of advantages of which half are clamped and a third are missing."""
    generator = torch.Generator().manual_seed(rewards)
    advantages = 7 * torch.randn(SAMPLES, rewards, generator=generator)
    assert rewards < 5 or 0.3 < (advantages.abs() > 5).float().mean() < 0.7
    advantages[torch.rand(SAMPLES, rewards, generator=generator) < 1 / 3] = torch.nan
    return coefficients(advantages, (~advantages.isnan()).sum(0), 0.1, 5.0)


def sample_losses(policy):
    generator = torch.Generator().manual_seed(2)
    clean, noisy, old = torch.randn(3, SAMPLES, 4, 8, 8, generator=generator)
    t = torch.rand(SAMPLES, generator=generator) * 0.9 + 0.05
    conditions = policy.encode([f"a photo of a {word}" for word in ("cat", "dog", "cup", "car", "cow", "cap")])
    velocity = policy.velocity(noisy, t, conditions)
    return *nft_losses(velocity, old, noisy, clean, t, 0.1), velocity


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rewards", [1, 2, 5, 20])
def test_two_passes_equal_one_pass_per_reward(policy, rewards, checkpointing):
    parameters, c = policy.parameters_of("trained"), half_clamped(rewards)
    taps = LinearTaps(policy.transformer, parameters)
    policy.transformer.train(checkpointing)
    if checkpointing:
        policy.transformer.enable_gradient_checkpointing()
    try:
        plus, minus, velocity = sample_losses(policy)
        gradients = taps.gradients(plus, minus, c, loss_scale=64.0)
        expected = gradients_by_passes(c.losses(plus, minus), parameters)
        assert expected.norm(dim=1).min() > 1e-3
        assert ((gradients - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
        # the graph can still be used for the KL term, and the taps do not affect it
        torch.testing.assert_close(
            torch.autograd.grad(velocity.square().mean(), parameters[0])[0],
            torch.autograd.grad(sample_losses(policy)[2].square().mean(), parameters[0])[0],
        )
    finally:
        policy.transformer.disable_gradient_checkpointing()
        policy.transformer.eval()


def test_two_passes_equal_one_pass_per_reward_under_autocast(policy):
    """Their difference is less than what bfloat16 costs, whether the gradients are computed within autocast or outside."""
    parameters, c = policy.parameters_of("trained"), half_clamped(5)
    plus, minus, _ = sample_losses(policy)
    exact = gradients_by_passes(c.losses(plus, minus), parameters)
    taps = LinearTaps(policy.transformer, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        plus, minus, _ = sample_losses(policy)
        within = taps.gradients(plus, minus, c)
        expected = gradients_by_passes(c.losses(plus, minus), parameters)
    outside = taps.gradients(plus, minus, c)
    assert within.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(within, outside)
    assert (within - expected).norm() < (expected - exact).norm()  # over all rewards: a short gradient is mostly rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_multiplied_as_it_is_and_summed_in_float32(dtype):
    """A sum in half precision would stop at 256 (bfloat16) or 2048 (float16) of these 4096 ones."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(3, 4096, size, generator=generator).to(dtype).cuda() for size in (8, 5))
    product = product_in_float32(one.mT, other)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, (one.double().mT @ other.double()).float(), rtol=1e-4, atol=1e-3)
    assert product_in_float32(torch.ones_like(one).mT, torch.ones_like(other)).eq(4096).all()


def test_weighted_reward_gradients_equal_one_backward_pass(policy):
    """Exact amortisation: autograd of sum_k w_k loss_k for any w."""
    parameters, c = policy.parameters_of("trained"), half_clamped(5)
    taps = LinearTaps(policy.transformer, parameters)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0])
    plus, minus, _ = sample_losses(policy)
    rows = taps.gradients(plus, minus, c)
    merged = torch.cat([g.flatten() for g in torch.autograd.grad(weights @ c.losses(plus, minus), parameters)])
    assert (weights @ rows - merged).norm() < 1e-5 * merged.norm()


def test_biases_and_layers_used_twice():
    torch.manual_seed(0)
    layer, last = nn.Linear(4, 4), nn.Linear(4, 1)
    module = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), last)
    parameters, inputs, c = list(module.parameters()), torch.randn(SAMPLES, 3, 4), half_clamped(5)
    taps = LinearTaps(module, parameters)
    out = module(inputs).mean((1, 2))
    plus, minus = (out - 1).square(), (out + 1).square()
    expected = gradients_by_passes(c.losses(plus, minus), parameters)
    torch.testing.assert_close(taps.gradients(plus, minus, c), expected, rtol=1e-5, atol=1e-6)


def test_unsupported_parameters_raise():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"Found 2 that are not, such as 1.bias; set `gradient_passes: per_reward`"):
        LinearTaps(module, list(module.parameters()))


def test_add_flat_adds():
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad = torch.ones(2, 2)
    add_flat(torch.arange(7.0), parameters)
    assert parameters[0].grad.tolist() == [[1, 2], [3, 4]]
    assert parameters[1].grad.tolist() == [4, 5, 6]


def compiler_stance():
    return torch._dynamo.eval_frame._stance.stance


@pytest.mark.parametrize("passes", ["two", "per_reward"])
def test_capture_is_undone_after_an_error(policy, passes):
    per_reward = RewardGradients(passes, policy.transformer, policy.parameters_of("trained"))

    def fail() -> None:
        assert compiler_stance() == "force_eager" and (per_reward.taps is None or per_reward.taps.on)
        raise torch.OutOfMemoryError

    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.raises(torch.OutOfMemoryError), per_reward.capture():
            fail()
        assert compiler_stance() == "eager_on_recompile"
        assert per_reward.taps is None or not per_reward.taps.on
