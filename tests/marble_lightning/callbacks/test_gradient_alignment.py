"""Probes measure the update that is applied, and leave no trace in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, FixedWeights, PCGrad, WeightedSum
from balancers.gramian import agreement, conflict_by_chance, gram_matrix
from marble_lightning.callbacks.gradient_alignment import Harmony, probe, refresh_figures, update_of
from marble_lightning.cli import QUIET
from marble_lightning.nft.reward_gradients import flat
from marble_lightning.utils.images import cosine_heatmap
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Probes(Callback):
    """Keeps what `probe` finds before every optimizer step, and the update it was asked about."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.updates: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(probe(pl_module, trainer.global_step))
        self.updates.append(update_of(pl_module))


@pytest.mark.parametrize("balancer", [MARBLE, WeightedSum, PCGrad])
def test_a_probe_changes_nothing(checkpoints, tmp_path, balancer):
    plain, _ = run(checkpoints, tmp_path, balancer(), rounds=3)
    probed, _ = run(checkpoints, tmp_path, balancer(), rounds=3, callbacks=[Probes()])
    for ours, theirs in zip(plain.trainable, probed.trainable, strict=True):
        assert torch.equal(ours, theirs)


def test_a_probe_of_own_pictures_against_plain_autograd(checkpoints, tmp_path):
    """On a step whose rewards are kept apart, the gradients a probe finds are those of the step."""
    probes = Probes()
    module, kept = run(checkpoints, tmp_path, FixedWeights(), rounds=2, kl_weight=0.5, callbacks=[probes])
    for step in range(2):
        gradients, _ = reference(module, kept, step)
        torch.testing.assert_close(probes.updates[step], kept.gradients[step], rtol=1e-5, atol=1e-7)
        units = gradients / gradients.norm(dim=1, keepdim=True)
        directions = {"update": kept.gradients[step], "mean": gradients.mean(0), "unit_mean": units.mean(0)}
        found = probes.found[step]["own"]
        for name, value in agreement(directions, gradients).items():
            assert found[name] == pytest.approx(value, abs=1e-3)
        assert found["chance"] == pytest.approx(conflict_by_chance(gram_matrix(gradients)), abs=1e-2)
        assert -0.5 < found["random/cos_min"] < 0.5


def test_the_update_of_a_refresh_is_what_the_optimizer_gets(checkpoints, tmp_path):
    probes = Probes()
    _, kept = run(checkpoints, tmp_path, MARBLE(refresh_every=2), rounds=3, kl_weight=0.5, callbacks=[probes])
    for update, gradient in zip(probes.updates, kept.gradients, strict=True):
        torch.testing.assert_close(update, gradient)
    solved = probes.found[0]["own"]
    assert solved["update/cos_min"] > 0 or solved["mean/cos_min"] > 0


def test_update_and_plain_mean_are_judged_by_the_same_fresh_gradients(checkpoints, tmp_path):
    """Uniform weights without a KL term make the update the plain mean, so the two must fare alike in every place."""
    probes = Probes()
    run(checkpoints, tmp_path, FixedWeights(), rounds=2, kl_weight=0.0, callbacks=[probes])
    for found in probes.found:
        for figures in found.values():
            for what in ("cos_min", "cos_mean", "cos_var"):
                assert figures[f"update/{what}"] == pytest.approx(figures[f"mean/{what}"], abs=1e-5)


def test_the_probed_sum_of_rewards_is_what_the_weighted_sum_trains_on(checkpoints, tmp_path):
    """The paper's baseline: one advantage of the summed rewards, not the mean of each reward's gradient."""
    probes = Probes()
    run(checkpoints, tmp_path, WeightedSum(), rounds=2, kl_weight=0.0, callbacks=[probes])
    differences = []
    for figures in (figures for found in probes.found for figures in found.values()):
        for what in ("cos_min", "cos_mean", "cos_var"):
            assert figures[f"weighted_sum/{what}"] == pytest.approx(figures[f"update/{what}"], abs=1e-5)
            differences.append(abs(figures[f"weighted_sum/{what}"] - figures[f"mean/{what}"]))
    assert max(differences) > 1e-2


def test_a_skipped_update_has_no_harmony(checkpoints, tmp_path):
    module, _ = run(checkpoints, tmp_path, WeightedSum())
    module.trainable[0].grad.fill_(torch.inf)
    assert probe(module, 0) == {}


def test_a_fresh_round_is_another_one(checkpoints, tmp_path):
    probes = Probes()
    run(checkpoints, tmp_path, WeightedSum(), rounds=2, callbacks=[probes])
    assert all(found["own"] != found["fresh"] for found in probes.found)
    assert probes.found[0]["fresh"] != probes.found[1]["fresh"]


def test_what_a_refresh_logs():
    balancer = MARBLE()
    balancer.bind(["a", "b", "c"])
    balancer.begin_step(1)
    balancer.add_gradients(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    balancer.solve(lambda gradients: gradients)
    gram = balancer.diagnostics.pop("gram")
    figures = refresh_figures(balancer)
    assert [figures[f"left_out/zero/{name}"] for name in "abc"] == [0, 0, 1]
    assert [figures[f"left_out/not_finite/{name}"] for name in "abc"] == [0, 0, 0]
    assert figures["alpha/a"] == pytest.approx(0.5)
    assert figures["alpha_age/a"] == 0
    assert figures["harmony/update/cos_min"] == pytest.approx(0.5**0.5)
    assert figures["harmony/update/conflict_rate"] == 0
    picture = cosine_heatmap(gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt()), balancer.names)
    assert picture.shape[0] == 3 and 0 <= picture.min() < picture.max() <= 1


def test_probes_too_often():
    with pytest.raises(ValueError, match="`harmony.probe_every` must be >= 1, or null"):
        Harmony(probe_every=0)


def test_an_update_without_gradients_is_zero(checkpoints, tmp_path):
    module, _ = run(checkpoints, tmp_path, WeightedSum())
    for parameter in module.trainable:
        parameter.grad = None
    assert torch.equal(update_of(module), torch.zeros_like(flat(module.trainable)))
