"""One optimizer step against plain autograd, and properties that balancing must not change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from balancers import MARBLE, FixedWeights, WeightedSum, min_norm_weights
from marble_lightning.command_line import QUIET
from marble_lightning.module import DiffusionNFT
from marble_lightning.nft.loss import Coefficients, coefficients
from marble_lightning.nft.reward_gradients import flat
from marble_lightning.nft.rollout import MicroBatch
from marble_lightning.policies.base import Conditions
from marble_lightning.policies.sd3 import SD3Policy
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


def test_a_step_between_refreshes_is_the_weighted_sum_of_per_reward_gradients(checkpoints, tmp_path):
    weights = {"bright": 0.2, "red": 0.5, "contrast": 0.3}
    module, recorded = run(checkpoints, tmp_path, FixedWeights(weights=weights), rounds=2, kl_weight=0.5, max_advantage=0.5)
    for step in range(2):
        gradients, kl = reference(module, recorded, step)
        expected = torch.tensor(list(weights.values())) @ gradients + 0.5 * kl
        torch.testing.assert_close(recorded.gradients[step], expected, rtol=1e-4, atol=1e-6)


def test_a_refresh_is_marbles_formula_and_kl_is_not_balanced(checkpoints, tmp_path):
    module, recorded = run(checkpoints, tmp_path, MARBLE(refresh_every=1, ema_decay=0.0), rounds=2, kl_weight=0.5)
    for step in range(2):
        gradients, kl = reference(module, recorded, step)
        norms = gradients.norm(dim=1)
        unit = gradients / norms[:, None]
        alpha = min_norm_weights(unit.double() @ unit.double().T).float()
        expected = alpha @ unit * norms.mean() + 0.5 * kl
        torch.testing.assert_close(recorded.gradients[step], expected, rtol=1e-3, atol=1e-6)


def test_weights_estimated_from_a_part_of_the_step_apply_to_all_of_it(checkpoints, tmp_path):
    balancer = MARBLE(refresh_every=1, ema_decay=0.0, estimate_share=0.5)
    module, recorded = run(checkpoints, tmp_path, balancer, kl_weight=0.0)
    gradients, _ = reference(module, recorded, 0)
    norms = balancer.diagnostics["gradient_norms"]  # of the first half
    coefficients_used = (balancer.smoothed.alpha_smoothed * norms.mean() / norms).float()
    torch.testing.assert_close(recorded.gradients[0], coefficients_used @ gradients, rtol=1e-3, atol=1e-6)


def test_rewards_merged_before_advantages_train_on_one_column(checkpoints, tmp_path):
    module, recorded = run(checkpoints, tmp_path, WeightedSum(), kl_weight=0.0)
    gradients, _ = reference(module, recorded, 0)
    assert gradients.shape[0] == 1
    torch.testing.assert_close(recorded.gradients[0], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def uniform(checkpoints, tmp_path_factory):
    """The module and the records of two rounds with uniform weights."""
    return run(checkpoints, tmp_path_factory.mktemp("uniform"), FixedWeights(), rounds=2)


def test_coefficients_are_normalised_over_the_whole_step(uniform):
    """Each reward's c+ and c- add up to A_max / beta over the step, for any micro-batch size."""
    _, recorded = uniform
    sums = sum(batch.coefficients.plus.sum(0) + batch.coefficients.minus.sum(0) for batch in recorded.batches[0])
    torch.testing.assert_close(sums, torch.full((3,), 5.0 / 0.5))


class Recut(DiffusionNFT):
    """Cuts a round into micro-batches of six, and regroups their samples by the requested micro-batch size."""

    def split_round(self, *arguments: Any) -> Iterator[MicroBatch]:
        plan, self.plan = self.plan, replace(self.plan, batch_size=6)
        batches, self.plan = list(super().split_round(*arguments)), plan
        clean, noise, t = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("clean", "noise", "t"))
        conditions = Conditions(
            *(torch.cat([getattr(b.conditions, name) for b in batches]) for name in ("embeds", "pooled"))
        )
        weights = Coefficients(*(torch.cat([getattr(b.coefficients, name) for b in batches]) for name in ("plus", "minus")))
        halves = torch.cat([batch.in_first for batch in batches])
        for part in torch.arange(len(clean)).split(plan.batch_size):
            shares = Coefficients(weights.plus[part], weights.minus[part])
            yield MicroBatch(clean[part], noise[part], t[part], conditions[part], shares, halves[part])


@pytest.mark.parametrize("balancer", [WeightedSum, MARBLE])
def test_the_micro_batch_size_does_not_matter(checkpoints, tmp_path, balancer):
    """On a refresh and on a step without one, with clamped advantages and a reward that applies to some samples only."""
    options = {} if balancer is WeightedSum else {"refresh_every": 2}
    gradients = [
        run(
            checkpoints, tmp_path, balancer(**options), rounds=2, kind=Recut, micro_batch_size=size, max_advantage=0.5,
            kl_weight=0.5,
        )[1].gradients
        for size in (3, 6, 12)
    ]  # fmt: skip
    for others in gradients[1:]:
        for expected, actual in zip(gradients[0], others, strict=True):
            assert (expected - actual).norm() <= 1e-5 * expected.norm()


def test_all_ways_to_compute_per_reward_gradients_agree(checkpoints, tmp_path):
    plain, *others = (
        run(
            checkpoints, tmp_path, MARBLE(refresh_every=2), rounds=3, gradient_passes=passes,
            gradient_checkpointing=checkpointing,
        )[1].gradients
        for passes, checkpointing in (("per_reward", False), ("per_reward", True), ("two", False), ("two", True))
    )  # fmt: skip
    for gradients in others:
        for actual, expected in zip(gradients, plain, strict=True):
            assert (actual - expected).norm() <= 1e-4 * expected.norm()


class Precisions(Callback):
    """Records for each forward pass whether the transformer ran under autocast."""

    def __init__(self) -> None:
        self.autocast: list[bool] = []

    def on_fit_start(self, trainer, pl_module):
        pl_module.policy.transformer.register_forward_pre_hook(
            lambda *_: self.autocast.append(torch.is_autocast_enabled("cpu"))
        )


@pytest.mark.parametrize("balancer", [pytest.param(WeightedSum, marks=pytest.mark.slow), MARBLE])
def test_mixed_precision_is_near_full_precision(checkpoints, tmp_path, balancer):
    """Sampling and training both run under autocast; gradients of a refresh and of the next step are similar."""
    precisions = Precisions()
    mixed = run(checkpoints, tmp_path, balancer(), rounds=2, callbacks=[precisions], precision="bf16-mixed")[1].gradients
    assert len(precisions.autocast) > 8 and all(precisions.autocast)
    for actual, expected in zip(mixed, run(checkpoints, tmp_path, balancer(), rounds=2)[1].gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.9


@pytest.mark.parametrize("balancer", [pytest.param(WeightedSum, marks=pytest.mark.slow), MARBLE])
def test_the_default_loss_scale_fits_half_precision(checkpoints, tmp_path, balancer):
    scaler = torch.amp.GradScaler("cpu")
    default = scaler.get_scale()
    run(checkpoints, tmp_path, balancer(), rounds=2, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert scaler.get_scale() == default


@pytest.mark.parametrize("balancer", [WeightedSum, MARBLE])
def test_a_too_large_loss_scale_shrinks_until_training_continues(checkpoints, tmp_path, balancer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-24)
    half = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module, _ = run(checkpoints, tmp_path, balancer(), rounds=4, plugins=[half], kl_weight=0.5)
    assert scaler.get_scale() < 2.0**60
    first = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, dtype="float32")
    first.setup(module.seed)
    change = (flat(module.trainable) - flat(first.parameters_of("trained"))).norm()
    assert 0 < change < torch.inf


class Overflowing(DiffusionNFT):
    """One reward's gradient does not fit half precision at a loss scale above 1024."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        per_reward = self.step.per_reward

        class Overflows:
            capture = per_reward.capture

            def __call__(self, *arguments: Any) -> Tensor:
                gradients, scaler = per_reward(*arguments), arguments[-1]
                gradients[1] *= torch.inf if scaler.get_scale() > 1024 else 1
                return gradients

        self.step.per_reward = Overflows()


def test_a_step_in_which_one_gradient_overflows_is_skipped_and_repeated(checkpoints, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    balancer, states = MARBLE(), States()
    run(
        checkpoints, tmp_path, balancer, rounds=3, kind=Overflowing, callbacks=[states],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )  # fmt: skip
    assert scaler.get_scale() == 1024.0
    assert [balancer["step"] for balancer in states.balancer] == [0, 0, 1]
    assert [balancer["counts"]["refreshes"] for balancer in states.balancer] == [0, 0, 1]
    assert all(balancer["alpha_smoothed"].isnan().all() for balancer in states.balancer[:2])
    assert balancer.smoothed.alpha_smoothed.isfinite().all()
    start, *after = states.adapters
    assert torch.equal(start, after[0]) and torch.equal(start, after[1])
    assert 0 < (after[2] - start).norm() < torch.inf


class States(Callback):
    """Keeps the adapter before the first and after every optimizer step, and the balancer's state after it."""

    def __init__(self) -> None:
        self.adapters: list[Tensor] = []
        self.balancer: list[dict[str, Any]] = []

    def on_train_start(self, trainer, pl_module):
        self.adapters.append(flat(pl_module.trainable))

    def on_train_epoch_end(self, trainer, pl_module):
        self.adapters.append(flat(pl_module.trainable))
        self.balancer.append(pl_module.balancer.state_dict())


def test_the_base_never_changes(checkpoints, uniform):
    module, _ = uniform
    fresh = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, dtype="float32")
    fresh.setup(seed=0)
    trained = module.policy.transformer.state_dict()
    for name, tensor in fresh.transformer.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, trained[name]), name


class Averages(Callback):
    """Keeps the trained and the averaged adapter after every round, here of one optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.steps.append(tuple(flat(pl_module.policy.parameters_of(name)).clone() for name in ("trained", "ema")))


def test_the_average_warms_up_as_in_the_published_code(checkpoints, tmp_path):
    averages = Averages()
    module, _ = run(checkpoints, tmp_path, WeightedSum(), rounds=3, ema_warmup=True, callbacks=[averages])
    first = SD3Policy(str(checkpoints / "sd3"), resolution=16, rank=2, alpha=4, dtype="float32")
    first.setup(module.seed)
    average = flat(first.parameters_of("ema"))
    for step, (trained, actual) in enumerate(averages.steps, start=1):
        decay = min((1 + step) / (10 + step), 0.75)
        average = decay * average + (1 - decay) * trained
        torch.testing.assert_close(actual, average, rtol=1e-5, atol=1e-7)


def test_loss_coefficients_have_the_published_values():
    advantages = torch.tensor([[1.0], [-2.0]])
    plus, minus = coefficients(advantages, torch.tensor([2]), 0.1, 5.0)
    torch.testing.assert_close(plus[:, 0], torch.tensor([0.6, 0.3]) * 50 / 2)
    torch.testing.assert_close(minus[:, 0], torch.tensor([0.4, 0.7]) * 50 / 2)
