"""Ablations beside the published ones."""

from __future__ import annotations

import pytest
import torch
from matplotlib import pyplot
from scipy.stats import norm
from torch.utils.tensorboard import SummaryWriter

from marble_lightning.lab.ablations import beside_paper, change_figure, harmony_beside_paper, interval, same_order, variants
from marble_lightning.lab.paper import ABLATIONS, HARMONY, REFERENCE
from marble_lightning.lab.report.collect import collect
from marble_lightning.lab.runs import Run
from tests.helpers.finished_runs import finish


@pytest.mark.parametrize(
    ("measured", "p_value", "published", "expected"),
    [
        (0.2, 0.01, 0.05, "yes"),
        (0.2, 0.01, -0.05, "no"),
        (-0.2, 0.05, float("-inf"), "yes"),
        (0.2, 0.051, 0.05, "within noise"),
        (0.2, 0.01, 0.0, "tied in the paper"),
    ],
)
def test_same_order(measured, p_value, published, expected):
    assert same_order(measured, p_value, published) == expected


def test_interval_of_one_seed_is_over_prompts():
    changes = torch.tensor([[0.1, 0.3, float("nan")]])
    found = interval(changes)
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(1.96 * 0.1, rel=1e-4)
    assert found.p_value == pytest.approx(2 * norm.sf(2))


def test_interval_without_an_error_shows_no_difference():
    assert interval(torch.tensor([[0.2]])).p_value == 1


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The published settings; a variant that loses both rewards; one that is not in the paper."""
    folder = tmp_path_factory.mktemp("found")
    gains = {REFERENCE: (0.2, 0.2), "no_normalisation": (-0.5, -0.5), "rho_0.1": (0.2, 0.2), "other": (0.1, 0.1)}
    for method, of_method in gains.items():
        for seed in range(3):
            finish(folder / method / f"seed_{seed}" / "version_0", seed, of_method)
    return collect([folder])


def test_every_published_ablation_is_a_variant():
    groups = variants(optimizer_steps=72)
    settings = {name: of_variant for group in groups.values() for name, of_variant in group.items()}
    assert not set(ABLATIONS) - {REFERENCE} - set(settings)
    assert settings["final_uniform"]["balancer"]["init_args"] == {"uniform_after_step": 57}


def test_variants_beside_the_paper(found):
    table = beside_paper(found, [REFERENCE, "no_normalisation", "rho_0.1", "other", "dropout"])
    assert table["variant"].tolist() == ["no_normalisation"] * 2 + ["rho_0.1"] * 2
    assert table["reward"].tolist() == ["geneval", "ocr"] * 2
    assert table["same order?"].tolist() == ["yes"] * 2 + ["within noise"] * 2
    assert table["paper: variant"].tolist() == ["fails", "fails", "0.86", "0.8"]
    assert table[f"difference to {REFERENCE}"][0].startswith("-0.7000 [")


def test_no_table_without_published_variants(found):
    assert beside_paper(found, ["other", "dropout"]).empty


def test_figure_has_a_panel_for_each_reward_and_a_dot_for_each_variant(found):
    figure = change_figure(found, [REFERENCE, "other", "not run"])
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == ["ocr", "geneval"]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == [REFERENCE, "other"]
    pyplot.close(figure)


def test_harmony_beside_the_paper(tmp_path):
    finish(tmp_path / "run", 0)
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, worst in enumerate((0.1, 0.3)):
            for place in ("harmony/update", f"probe/{('solved', 'reused')[step]}/own/weighted_sum"):
                sign = 1 if place == "harmony/update" else -1
                for name, value in (("cos_min", sign * worst), ("cos_mean", 0.4), ("cos_var", 0.01)):
                    writer.add_scalar(f"{place}/{name}", value, step)
    table = harmony_beside_paper(Run(tmp_path / "run"))
    assert table.index.tolist() == ["MARBLE", "weighted sum"]
    assert table["worst"].tolist() == pytest.approx([0.2, -0.2])
    assert table["conflicts"].tolist() == [0.0, 1.0]
    assert table["paper: worst"].tolist() == [HARMONY[name]["worst"] for name in table.index]


def test_published_variants_have_scores_of_the_same_rewards():
    assert all(set(scores) <= set(ABLATIONS[REFERENCE]) for scores in ABLATIONS.values())
