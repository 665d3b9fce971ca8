"""Probes use the update that is applied, and do not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, FixedWeights, PCGrad, WeightedSum
from balancers.gramian import agreement, conflict_by_chance, gram_matrix
from marble_lightning.callbacks.alignment_probe import probe, update_of
from marble_lightning.callbacks.gradient_alignment import GradientAlignment, refresh_figures
from marble_lightning.command_line import QUIET
from marble_lightning.nft.reward_gradients import flat
from marble_lightning.utils.images import cosine_heatmap
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


class Probes(Callback):
    """Keeps the figures of a probe before every optimizer step, and the update."""

    def __init__(self) -> None:
        self.figures: list[Any] = []
        self.updates: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.figures.append(probe(pl_module, trainer.global_step).by_place)
        self.updates.append(update_of(pl_module))


@pytest.fixture(scope="module")
def summed(checkpoints, tmp_path_factory):
    """The module and the probes of a run with WeightedSum and without a KL term."""
    probes, folder = Probes(), tmp_path_factory.mktemp("summed")
    return run(checkpoints, folder, WeightedSum(), rounds=2, kl_weight=0.0, callbacks=[probes])[0], probes


@pytest.fixture(scope="module")
def refreshed(checkpoints, tmp_path_factory):
    """The module, the records and the probes of a run with MARBLE: a refresh, a step without one, and a refresh."""
    probes, folder = Probes(), tmp_path_factory.mktemp("refreshed")
    return *run(checkpoints, folder, MARBLE(refresh_every=2), rounds=3, kl_weight=0.5, callbacks=[probes]), probes


@pytest.mark.parametrize("balancer", [MARBLE, WeightedSum, pytest.param(PCGrad, marks=pytest.mark.slow)])
def test_a_probe_changes_nothing(checkpoints, tmp_path, summed, refreshed, balancer):
    if balancer is WeightedSum:
        plain, probed = run(checkpoints, tmp_path, balancer(), rounds=2, kl_weight=0.0)[0], summed[0]
    elif balancer is MARBLE:
        plain, probed = run(checkpoints, tmp_path, MARBLE(refresh_every=2), rounds=3, kl_weight=0.5)[0], refreshed[0]
    else:
        plain, _ = run(checkpoints, tmp_path, balancer(), rounds=2)
        probed, _ = run(checkpoints, tmp_path, balancer(), rounds=2, callbacks=[Probes()])
    for expected, actual in zip(plain.trainable, probed.trainable, strict=True):
        assert torch.equal(expected, actual)


def test_a_probe_of_own_images_against_plain_autograd(checkpoints, tmp_path):
    """On a step with per-reward gradients, a probe uses the gradients of the step."""
    probes = Probes()
    module, recorded = run(checkpoints, tmp_path, FixedWeights(), rounds=2, kl_weight=0.5, callbacks=[probes])
    for step in range(2):
        gradients, _ = reference(module, recorded, step)
        torch.testing.assert_close(probes.updates[step], recorded.gradients[step], rtol=1e-5, atol=1e-7)
        units = gradients / gradients.norm(dim=1, keepdim=True)
        directions = {"update": recorded.gradients[step], "mean": gradients.mean(0), "unit_mean": units.mean(0)}
        figures = probes.figures[step]["own"]
        for name, value in agreement(directions, gradients).items():
            assert figures[name] == pytest.approx(value, abs=1e-3)
        assert figures["chance"] == pytest.approx(conflict_by_chance(gram_matrix(gradients)), abs=1e-2)
        assert -0.5 < figures["random/cos_min"] < 0.5


def test_the_update_of_a_refresh_is_the_optimizers_gradient(refreshed):
    _, recorded, probes = refreshed
    for update, gradient in zip(probes.updates, recorded.gradients, strict=True):
        torch.testing.assert_close(update, gradient)
    solved = probes.figures[0]["own"]
    assert solved["update/cos_min"] > 0 or solved["mean/cos_min"] > 0


def test_update_and_mean_are_compared_with_the_same_fresh_gradients(checkpoints, tmp_path):
    """Uniform weights without a KL term make the update the mean, so both must have the same figures."""
    probes = Probes()
    run(checkpoints, tmp_path, FixedWeights(), rounds=2, kl_weight=0.0, callbacks=[probes])
    for by_place in probes.figures:
        for figures in by_place.values():
            for name in ("cos_min", "cos_mean", "cos_var"):
                assert figures[f"update/{name}"] == pytest.approx(figures[f"mean/{name}"], abs=1e-5)


def test_the_weighted_sum_of_a_probe_is_the_gradient_of_the_balancer(summed):
    """The paper's baseline: one advantage of the summed rewards, not the mean of each reward's gradient."""
    differences = []
    for figures in (figures for by_place in summed[1].figures for figures in by_place.values()):
        for name in ("cos_min", "cos_mean", "cos_var"):
            assert figures[f"weighted_sum/{name}"] == pytest.approx(figures[f"update/{name}"], abs=1e-5)
            differences.append(abs(figures[f"weighted_sum/{name}"] - figures[f"mean/{name}"]))
    assert max(differences) > 1e-2


def test_a_skipped_update_has_no_figures(summed, monkeypatch):
    module, _ = summed
    monkeypatch.setattr(module.trainable[0], "grad", torch.full_like(module.trainable[0], torch.inf))
    assert probe(module, 0).by_place == {}


def test_a_fresh_round_is_independent(summed):
    _, probes = summed
    assert all(by_place["own"] != by_place["fresh"] for by_place in probes.figures)
    assert probes.figures[0]["fresh"] != probes.figures[1]["fresh"]


def test_metrics_of_a_refresh():
    balancer = MARBLE()
    balancer.bind(["a", "b", "c"])
    balancer.begin_step(1)
    balancer.add_gradients(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    balancer.solve(lambda gradients: gradients)
    gram = balancer.diagnostics.pop("products").own
    figures = refresh_figures(balancer)
    assert [figures[f"left_out/zero/{name}"] for name in "abc"] == [0, 0, 1]
    assert [figures[f"left_out/not_finite/{name}"] for name in "abc"] == [0, 0, 0]
    assert figures["alpha/a"] == pytest.approx(0.5)
    assert figures["alpha_age/a"] == 0
    assert figures["harmony/update/cos_min"] == pytest.approx(0.5**0.5)
    assert figures["harmony/update/conflict_rate"] == 0
    figure = cosine_heatmap(gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt()), balancer.names)
    assert figure.shape[0] == 3 and 0 <= figure.min() < figure.max() <= 1


def test_a_heat_map_has_whole_names():
    name = "a_reward_with_a_long_name"
    both, first = (cosine_heatmap(torch.eye(2), [name, second]) for second in (name, ""))
    columns = (both - first)[:, :20].abs().sum((0, 1)).nonzero()  # above the second column
    assert columns.max() - columns.min() > 4 * len(name)


def test_probe_every_must_be_positive():
    with pytest.raises(ValueError, match="`gradient_alignment.probe_every` must be >= 1, or null"):
        GradientAlignment(probe_every=0)


def test_an_update_without_gradients_is_zero(summed, monkeypatch):
    module, _ = summed
    for parameter in module.trainable:
        monkeypatch.setattr(parameter, "grad", None)
    assert torch.equal(update_of(module), torch.zeros_like(flat(module.trainable)))
