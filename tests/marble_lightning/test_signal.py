"""Halves of the prompts in training: products of a refresh against plain autograd, state, and the summary of a run."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from balancers import MARBLE, AdvantageSum, FixedWeights, WeightedSum, min_norm_weights
from balancers.gramian import gram_matrix
from balancers.options import GradientOptions
from balancers.signal_gram import SignalGram
from marble_lightning.callbacks.alignment_probe import probe
from marble_lightning.callbacks.alignment_summary import AlignmentSummary
from marble_lightning.callbacks.gradient_alignment import GradientAlignment
from marble_lightning.command_line import QUIET
from marble_lightning.nft.loss import Coefficients
from marble_lightning.nft.rollout import first_half
from tests.helpers.small_runs import reference, run

pytestmark = [pytest.mark.filterwarnings(f"ignore:{known}") for known in QUIET]


def split_marble(**options):
    return MARBLE(**{"refresh_every": 1, "gram": "split", "gram_decay": 0.9} | options)


class Diagnostics(Callback):
    """Keeps the balancer's diagnostics of every refresh; it must come before `GradientAlignment`."""

    def __init__(self) -> None:
        self.kept: list[dict[str, object]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.balancer.diagnostics:
            self.kept.append(pl_module.balancer.diagnostics)
            pl_module.balancer.diagnostics = {}


def test_halves_are_whole_prompts_of_all_ranks():
    """Every rank sees its part of one draw: half of all prompts, and another half with another key."""
    ranks = [first_half(6, rank, 3, (0, 7, "halves")) for rank in range(3)]
    assert int(torch.cat(ranks).sum()) == 9
    assert torch.equal(torch.cat(ranks), first_half(18, 0, 1, (0, 7, "halves")))
    assert not torch.equal(ranks[0], first_half(6, 0, 3, (0, 8, "halves")))
    assert [int(first_half(5, 0, 1, (seed, "halves")).sum()) for seed in range(3)] == [3, 3, 3]
    shares = torch.stack([first_half(6, 0, 1, (seed, "halves")) for seed in range(2000)]).double().mean(0)
    torch.testing.assert_close(shares, torch.full((6,), 0.5).double(), rtol=0, atol=4.5 * 0.5 / 2000**0.5)


def test_parts_of_coefficients_add_up_and_count_their_samples():
    coefficients = Coefficients(
        torch.tensor([[0.5, 0.0], [0.2, 0.1], [0.0, 0.3]]), torch.tensor([[0.1, 0], [0.4, 0.2], [0.6, 0]])
    )
    parts = coefficients.split(torch.tensor([True, False, True]))
    for part, whole in zip(parts, coefficients, strict=True):
        assert torch.equal(part[:, :2] + part[:, 2:], whole)
        assert torch.equal(part[1, :2], torch.zeros(2)) and torch.equal(part[0, 2:], torch.zeros(2))
    torch.testing.assert_close(parts.samples, torch.tensor([1.2, 0.3, 0.6, 0.3]))


def of_half(batch, in_first):
    """A micro-batch with coefficients of 0 outside a half."""
    mask = (batch.in_first == in_first)[:, None]
    return replace(batch, coefficients=Coefficients(*(part * mask for part in batch.coefficients)))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="two_passes"),
        pytest.param({"gradient_passes": "per_reward"}, id="per_reward"),
        pytest.param({"gradient_checkpointing": True, "micro_batch_size": 3}, id="checkpointing"),
        pytest.param({"micro_batch_size": 2, "inner_epochs": 2}, marks=pytest.mark.slow, id="accumulation"),
    ],
)
def test_products_of_a_refresh_are_those_of_each_half_alone(checkpoints, tmp_path, options):
    """The gradient of a half, by autograd from its images only, is normalised by its own samples."""
    diagnostics = Diagnostics()
    module, recorded = run(checkpoints, tmp_path, split_marble(), callbacks=[diagnostics], kl_weight=0.0, **options)
    for step, kept in enumerate(diagnostics.kept):
        batches = recorded.batches[step]
        whole, halves = reference(module, recorded, step)[0], []
        total = sum(batch.coefficients.samples for batch in batches)
        for in_first in (True, False):
            recorded.batches[step] = [of_half(batch, in_first) for batch in batches]
            share = sum(batch.coefficients.samples for batch in recorded.batches[step]) / total
            halves.append(reference(module, recorded, step)[0] / share[:, None])
        expected = gram_matrix(*halves)
        torch.testing.assert_close(kept["products"].own, gram_matrix(whole), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(kept["products"].cross, expected, rtol=1e-3, atol=1e-9, equal_nan=True)
        assert kept["products"].split.isfinite().sum() >= 4  # one of three rewards may be absent from a half


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_parts_change_the_update_by_rounding_only(checkpoints, tmp_path, precision):
    whole, _ = run(checkpoints, tmp_path, MARBLE(refresh_every=1, measure_signal=False), rounds=2, precision=precision)
    parts, _ = run(checkpoints, tmp_path, MARBLE(refresh_every=1), rounds=2, precision=precision)
    for expected, actual in zip(whole.trainable, parts.trainable, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_the_solution_uses_the_averaged_signal(checkpoints, tmp_path):
    diagnostics, options = Diagnostics(), {"gram_decay": 0.5, "ema_decay": 0.0}
    run(checkpoints, tmp_path, split_marble(**options), rounds=3, callbacks=[diagnostics], rewards=("bright", "contrast"))
    signal = SignalGram(2, GradientOptions(gram="split", gram_decay=0.5))
    for kept in diagnostics.kept:
        signal.update(kept["products"])
        gram = signal.estimate()
        unit = gram / gram.diagonal().sqrt().outer(gram.diagonal().sqrt())
        torch.testing.assert_close(kept["alpha"], min_norm_weights(unit))
    assert len(diagnostics.kept) == 3


def test_gradients_without_halves_are_refused():
    balancer = split_marble()
    balancer.bind(["a", "b"])
    balancer.begin_step(1)
    with pytest.raises(ValueError, match="`gram: split` needs the gradients of two halves of the prompts. Found none."):
        balancer.add_gradients(torch.eye(2))
    with pytest.raises(ValueError, match=r"`gradients` must have shape \(2, 2, P\). Found \(2, 2\)."):
        balancer.add_gradients(torch.eye(2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="`gram: split` needs the gradients of two halves. Found `measure_signal: false`"):
        MARBLE(gram="split", gram_decay=0.9, measure_signal=False)
    with pytest.raises(ValueError, match="`gram_shrinkage` needs `gram_decay` > 0"):
        MARBLE(gram="split")


def test_a_reward_that_is_never_in_both_halves_is_merged_by_its_own_products():
    balancer = split_marble(gram_shrinkage=False)
    balancer.bind(["a", "b", "c"])
    parts = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 2]], [[1, 0, 0], [0, 1, 0], [0, 0, 0]]])
    balancer.begin_step(1)
    balancer.add_gradients(parts, torch.tensor([[1.0, 1, 2], [1, 1, 0]]))
    merged = balancer.solve(lambda tensor: tensor)
    assert balancer.active.all()
    torch.testing.assert_close(merged, torch.full((3,), 2 / 3), rtol=0, atol=1e-5)
    balancer.end_step()
    balancer.begin_step(2)
    balancer.add_gradients(parts, torch.ones(2, 3))
    with pytest.raises(ValueError, match="All micro-batches of a step must have `samples`, or none. Found both."):
        balancer._sum.add(parts[0], None, 3)


def gradients_of_halves(module, recorded):
    """Per-column gradients of the first step and of its halves, (3, column, parameter), by autograd from their images."""
    batches = recorded.batches[0]
    total, found = sum(batch.coefficients.samples for batch in batches), [reference(module, recorded, 0)[0]]
    for in_first in (True, False):
        recorded.batches[0] = [of_half(batch, in_first) for batch in batches]
        share = sum(batch.coefficients.samples for batch in recorded.batches[0]) / total
        found.append(reference(module, recorded, 0)[0] / share[:, None])
    return torch.stack(found)


class Probing(Callback):
    """Keeps the figures of a probe, and the balancer's weights, before every optimizer step."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append((probe(pl_module, trainer.global_step, fresh=False), pl_module.balancer.loss_weights))


def probed(checkpoints, folder, balancer):
    """The balancer's gradients of the first step and of its halves, and the figures and weights of a probe."""
    probing, names = Probing(), ("bright", "contrast")
    columns = gradients_of_halves(*run(checkpoints, folder, balancer, kl_weight=0.0, callbacks=[probing], rewards=names))
    return columns, *probing.found[0]


@pytest.fixture(scope="module")
def by_reward(checkpoints, tmp_path_factory):
    """Of a balancer whose gradients are those of the rewards."""
    return probed(checkpoints, tmp_path_factory.mktemp("by_reward"), FixedWeights())


@pytest.mark.parametrize("balancer", [AdvantageSum, FixedWeights, WeightedSum, split_marble])
def test_split_cosines_of_a_probe_are_those_of_the_halves(checkpoints, tmp_path, by_reward, balancer):
    """The update's parts with each reward's gradient from the other half; the first step has the same images always."""
    rewards = by_reward[0]
    columns, figures, weights = by_reward if balancer is FixedWeights else probed(checkpoints, tmp_path, balancer())
    update, first, second = (weights[:, None] * columns).sum(1)
    products = (rewards[2] @ first + rewards[1] @ second) / 2
    expected = products / update.norm() / rewards[0].norm(dim=1)
    torch.testing.assert_close(figures.cosines["split"].float(), expected, rtol=1e-3, atol=1e-5)
    own = torch.nn.functional.cosine_similarity(rewards[0], update[None])
    torch.testing.assert_close(figures.cosines["own"].float(), own, rtol=1e-3, atol=1e-5)
    assert figures.by_place["split"]["update/cos_min"] == pytest.approx(float(expected.min()), rel=1e-3)
    assert figures.by_place["own"]["update/cos_min"] == pytest.approx(float(own.min()), rel=1e-3)


@pytest.mark.parametrize("balancer", [FixedWeights, split_marble])
def test_every_balancer_logs_signal_and_noise(checkpoints, tmp_path, balancer, monkeypatch, capsys):
    """A method without refreshes by probes, the others at refreshes; and the run ends with a table."""
    logged = {}
    monkeypatch.setattr(
        "marble_lightning.callbacks.gradient_alignment.log_metrics", lambda trainer, metrics, step: logged.update(metrics)
    )
    alignment = GradientAlignment(probe_every=1, fresh=False)
    run(checkpoints, tmp_path, balancer(), rounds=2, callbacks=[alignment], rewards=("bright", "contrast"))
    for name in ("bright", "contrast"):
        assert logged[f"signal_to_noise/{name}"] >= 0
        assert -1 <= logged[f"cosine/update/own/{name}"] <= 1
        assert abs(logged[f"cosine/update/split/{name}"]) < 100
    assert len(alignment.summary.cosines["split"]) == len(alignment.summary.rounds) == 2
    assert "signal / noise" in capsys.readouterr().out
    resumed = GradientAlignment()
    resumed.load_state_dict(copy.deepcopy(alignment.state_dict()))
    assert str(resumed.state_dict()) == str(alignment.state_dict())


def test_a_refresh_without_gradients_has_no_cosines(monkeypatch):
    logged = {}
    alignment, balancer = GradientAlignment(), split_marble()
    for name in ("log_metrics", "log_image"):
        monkeypatch.setattr(
            f"marble_lightning.callbacks.gradient_alignment.{name}", lambda _, found, *rest: logged.update(found)
        )
    balancer.bind(["a", "b"])
    balancer.begin_step(1)
    balancer.add_gradients(torch.zeros(2, 2, 3), torch.ones(2, 2))
    assert not balancer.solve(lambda tensor: tensor).any()
    alignment.on_train_batch_end(SimpleNamespace(callbacks=[balancer], global_step=0, is_global_zero=False))
    assert logged["left_out/zero/a"] == 1 and alignment.signal is None and balancer.diagnostics == {}


def test_a_reward_that_fell_with_positive_cosines_is_named():
    summary, draws = AlignmentSummary(), torch.Generator().manual_seed(0)
    for step in range(40):
        noise = 0.05 * torch.randn(3, generator=draws)
        summary.note_cosines(torch.tensor([0.4, 0.4, -0.3]) + noise, torch.tensor([0.1, -0.2, -0.2]) + noise)
        summary.note_round(
            step, (torch.tensor([0.5 + 0.002 * step, 0.5 - 0.002 * step, 0.5 - 0.01 * step]) + 0.2 * noise).tolist()
        )
    assert [summary.has_fallen(index) for index in range(3)] == [False, True, True]
    (message,) = summary.warnings(["rises", "falls", "opposed"])  # the last one's cosines already said so
    assert message.startswith("The training mean of falls has fallen from 0.49")
    assert (
        "the update's mean cosine with its gradient was +0.4" in message
        and "on halves of the prompts it was -0.2" in message
    )
    assert summary.warnings([]) == [] and AlignmentSummary().warnings(["a"]) == []


def test_noise_in_training_means_is_no_fall():
    draws, fallen = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        summary = AlignmentSummary()
        for step, value in enumerate(torch.randn(44, generator=draws).tolist()):
            summary.note_round(step, [value])
        fallen += summary.has_fallen(0)
    assert fallen <= 9  # 1 % of 300, and three standard deviations
