"""Optimizer steps: clipping, learning rate, the old and the averaged adapter, and inner epochs."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from balancers import FixedWeights, WeightedSum
from marble_lightning.command_line import QUIET
from marble_lightning.nft.reward_gradients import flat
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_a_fused_optimizer_is_clipped_like_any_other(checkpoints, tmp_path, precision):
    """Lightning's clipping refuses it under autocast, though only a loss scaler would prevent it."""
    moves = []
    for fused in (False, True):

        def sgd(parameters, fused=fused):
            return torch.optim.SGD(parameters, lr=1.0, fused=fused)

        module, recorded = run(checkpoints, tmp_path, FixedWeights(), precision=precision, clip=1e-3, optimizer=sgd)
        before = torch.cat([recorded.states[0][name].flatten() for name in recorded.states[0] if ".trained." in name])
        moves.append(flat(module.trainable) - before)
    torch.testing.assert_close(moves[1], moves[0])
    assert moves[0].norm() == pytest.approx(1e-3, rel=1e-2)


def test_a_fused_optimizer_with_a_loss_scaler_is_refused(checkpoints, tmp_path):
    """It would also divide the merged gradient by the scale."""

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="`optimizer` must not be a fused one .* 16-mixed.* Found a fused AdamW"):
        run(checkpoints, tmp_path, FixedWeights(), plugins=[half], optimizer=adamw)


def test_a_schedule_by_a_metric_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="`lr_scheduler` must be one that goes by optimizer steps. Found ReduceLROnPlateau"):
        run(checkpoints, tmp_path, WeightedSum(), lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_the_learning_rate_follows_its_schedule(checkpoints, tmp_path):
    """The schedule steps once per optimizer step, not per micro-batch."""

    def halved(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    module, _ = run(checkpoints, tmp_path, WeightedSum(), rounds=2, lr_scheduler=halved)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


def test_old_and_averaged_adapters_move_as_scheduled(checkpoints, tmp_path):
    module, recorded = run(checkpoints, tmp_path, FixedWeights(), rounds=2)
    policy = module.policy
    final = [parameter.clone() for parameter in policy.parameters_of("trained")]
    old, ema = ([p.clone() for p in policy.parameters_of(name)] for name in ("old", "ema"))
    policy.transformer.load_state_dict(recorded.states[0])
    initial = [parameter.clone() for parameter in policy.parameters_of("trained")]
    policy.transformer.load_state_dict(recorded.states[1])
    between = [parameter.clone() for parameter in policy.parameters_of("trained")]
    for first, second, last, actual_old, actual_ema in zip(initial, between, final, old, ema, strict=True):
        after_one = 0.5 * first + 0.5 * second  # the decay of the old adapter is min(0.5 * step, 0.5)
        torch.testing.assert_close(actual_old, 0.5 * after_one + 0.5 * last)
        averaged = 0.75 * first + 0.25 * second
        torch.testing.assert_close(actual_ema, 0.75 * averaged + 0.25 * last)


def test_inner_epochs_train_on_the_same_images_again(checkpoints, tmp_path):
    """Times and noise differ; the old adapter is updated after the last epoch, the averaged one after each step."""
    module, recorded = run(checkpoints, tmp_path, FixedWeights(), inner_epochs=2)
    assert len(recorded.gradients) == module.global_step == 2
    first, second = (torch.cat([batch.clean.flatten(1) for batch in step]).sort(0).values for step in recorded.batches)
    torch.testing.assert_close(first, second)
    noises = [torch.cat([batch.noise.flatten() for batch in step]) for step in recorded.batches]
    assert (noises[0] - noises[1]).abs().max() > 0.1
    names = [[name for name in state if ".old." in name] for state in recorded.states]
    assert names[0]
    assert all(torch.equal(recorded.states[0][name], recorded.states[1][name]) for name in names[0])
    gradients, kl = reference(module, recorded, 1)
    torch.testing.assert_close(
        recorded.gradients[1], gradients.mean(0) + module.objective.kl_weight * kl, rtol=1e-4, atol=1e-6
    )
