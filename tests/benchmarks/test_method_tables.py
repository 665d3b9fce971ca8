"""Tables of methods from made-up results."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks.fingerprint import resolve
from benchmarks.method_figure import write_gains_figure
from benchmarks.method_tables import (
    cadences,
    changes_table,
    cosines_of,
    cosines_table,
    difference_table,
    gains_table,
    stack_specialists,
)
from benchmarks.methods import COMPARED, METHODS

NAMES = ["a", "b"]


def result(gain, seed=0, cosines=None, names=("a", "b")):
    """A run that changes rewards by `gain` on average, with a little noise over 20 prompts."""
    noise = 0.01 * torch.randn(20, len(names), generator=torch.Generator().manual_seed(seed))
    trained = (torch.tensor(gain) + noise).tolist()
    return {
        "rewards": list(names),
        "base": [[0.0] * len(names)] * 20,
        "trained": trained,
        "seconds": 90,
        "balancer": "MARBLE, refresh_every 5",
        "kl": 0.04,
        "trained_rewards": list(names) if cosines else [],
        "cosines": cosines or {"own": [], "split": []},
    }


def results(**gains):
    return {method: {seed: result(gain, seed) for seed in (0, 1, 2)} for method, gain in gains.items()}


@pytest.fixture(name="specialists")
def _specialists():
    runs = {"a": [result([1.0, -1.0], seed) for seed in (3, 4, 5)], "b": [result([0.0, 0.5], seed) for seed in (6, 7)]}
    return stack_specialists(runs)


def test_specialists_are_columns_with_the_fewest_seeds(specialists):
    assert specialists.shape == (2, 20, 2)
    torch.testing.assert_close(specialists.mean((0, 1)), torch.tensor([1.0, 0.5]).double(), rtol=0, atol=0.02)


def test_changes_have_intervals_or_errors():
    text = changes_table(results(one=[0.5, 0.25]), NAMES)
    assert re.search(r"\| one \| 3 \| \+0\.49\d\d \[\+0\.49\d\d, \+0\.50\d\d\] \| \+0\.2.* \| 0\.040 \| 1\.5 \|$", text)
    assert " ± 0.00" in changes_table({"one": {0: result([0.5, 0.25])}}, NAMES)
    assert cadences(results(one=[0.5, 0.25])) == "- one: MARBLE, refresh_every 5"


def test_the_least_gain_comes_first(specialists):
    text = gains_table(results(one=[0.5, 0.5], two=[0.2, 0.5]), NAMES, specialists)
    assert "| one | 3 | +0.50 (a) | +0.75 | +0.75 | +0.50 | +1.00 |" in text
    assert "| two | 3 | +0.20 (a) | +0.60 | +0.60 | +0.20 | +1.00 |" in text


def test_a_reward_without_a_specialist_that_gains_does_not_count(specialists):
    specialists[:, :, 0] = torch.randn(2, 20)
    specialists[:, :, 0] -= specialists[:, :, 0].mean()
    text = gains_table(results(one=[0.1, 0.5]), NAMES, specialists)
    assert "| one | 3 | +1.00 (b) | +1.00 | +1.00 | - | +1.00 |" in text
    specialists[:, :, 1] = specialists[:, :, 0]
    assert "| one | 3 | - | - | - | - |" in gains_table(results(one=[0.1, 0.5]), NAMES, specialists)


def test_differences_of_gains_have_intervals(specialists):
    text = difference_table(results(one=[0.5, 0.5], two=[0.2, 0.5]), "two", NAMES, specialists)
    assert "least gain - that of two" in text and "| two |" not in text
    pattern = r"\| one \| 3 \| (\S+) \[(\S+), (\S+)\] \| < 0.001 \| (\S+) \[.*\] \| 100% \|$"
    mean, low, high, mean_gain = map(float, re.search(pattern, text).groups())
    assert low < 0.3 < high and mean == pytest.approx(0.3, abs=0.01)
    assert mean_gain == pytest.approx(0.15, abs=0.01)
    one_seed = {"one": {0: result([0.5, 0.5])}, "two": {0: result([0.2, 0.5]), 1: result([0.2, 0.5])}}
    assert "| one | 1 | needs 2 seeds" in difference_table(one_seed, "two", NAMES, specialists)


def test_p_values_are_corrected_for_the_number_of_methods(specialists):
    runs = {"one": {seed: result([0.202, 0.5], seed + 10) for seed in (0, 1, 2)}, **results(two=[0.2, 0.5])}
    same = {**runs, "three": runs["two"]}
    alone, corrected = (
        float(difference_table(each, "two", NAMES, specialists).splitlines()[2].split(" | ")[3]) for each in (runs, same)
    )
    assert 0.01 < alone < 0.5 and corrected == pytest.approx(2 * alone, abs=0.0011)


def test_cosines_are_means_over_refreshes_and_seeds():
    cosines = {"own": [[0.5, 0.3], [0.7, -0.1]], "split": [[0.1, None]]}
    run = result([1, 1], cosines=cosines)
    text = cosines_table({"one": {0: run}, "two": {0: result([1, 1])}}, NAMES)
    assert "| one | own | 2 | +0.600 ± 0.100 | +0.100 ± 0.200 | 50% | - |" in text
    assert "| one | split | 1 | +0.100 | - | - | - |" in text
    assert "two" not in text and "just solved" not in text


def test_errors_of_cosines_are_over_seeds():
    """Refreshes of one run share a policy; as independent samples they would give ± 0.082."""
    runs = {seed: result([1, 1], cosines={"own": [[value, 0.1]] * 4, "split": []}) for seed, value in enumerate((0.2, 0.6))}
    assert "| one | own | 8 | +0.400 ± 0.200 | +0.100 ± 0.000 | 0% | - |" in cosines_table({"one": runs}, NAMES)


def test_cosines_of_weights_just_solved_and_conflicts_by_chance():
    run = result([1, 1], cosines={"own": [[0.5, 0.3]], "split": [[0.1, -0.1]]})
    text = cosines_table({"one": {0: {**run, "solved": [[0.4, 0.4]], "chance": 0.75}}}, NAMES)
    assert "| one | own, just solved | 1 | +0.400 | +0.400 | 0% | - |" in text
    assert "| one | split | 1 | +0.100 | -0.100 | 100% | 75% |" in text


def test_cosines_are_selected_by_name():
    run = result([1, 1], cosines={"own": [[0.5, 0.3]], "split": []})
    assert cosines_of(run, "own", ["b", "c"])[0, 0] == pytest.approx(0.3)
    assert cosines_of(run, "own", ["b", "c"])[0, 1].isnan()
    assert cosines_of(run, "split", NAMES).shape == (0, 2)


def test_variants_are_not_run_by_default():
    variants = {name for name in METHODS if not name.endswith("_std_round")} - set(COMPARED)
    assert {name for name in variants if name.startswith("split")} == {
        "split_decay_0", "split_decay_0.7", "split_decay_0.97", "split_floor_0.05", "split_floor_0.5", "split_every_2",
        "split_every_10", "split_shrinkage_false",
    }  # fmt: skip
    assert {name.removesuffix("_cadence_marble") for name in variants if not name.startswith("split")} == {
        "pcgrad", "cagrad", "mgda", "upgrad", "aligned_mtl", "nash_mtl", "imtl_g", "gradvac", "fairgrad",
        "marble_every_1", "marble_paper",
        "marble_kl_0.01", "marble_kl_0.1", "advantage_sum_kl_0.01", "advantage_sum_kl_0.1",
    }  # fmt: skip


def test_every_method_has_arguments_of_its_own():
    assert len(set(map(tuple, METHODS.values()))) == len(METHODS)


@pytest.mark.slow
def test_every_method_is_a_configuration_of_its_own():
    methods = {name: arguments for name, arguments in METHODS.items() if not name.endswith("_std_round")}
    methods["marble_std_round"] = METHODS["marble_std_round"]  # the others differ from theirs in the same option
    resolved = [json.dumps(resolve("-c", "tiny", *arguments), sort_keys=True) for arguments in methods.values()]
    assert len(set(resolved)) == len(methods)


def test_the_figure_needs_a_specialist_that_gains(specialists, tmp_path):
    compared = results(one=[0.5, 0.25], two=[0.2, 0.4])
    write_gains_figure(compared, NAMES, specialists, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="needs a specialist that gains"):
        write_gains_figure(compared, NAMES, -specialists, tmp_path / "none.png")
