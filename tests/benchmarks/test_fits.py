"""Runs of comparisons: what identifies them, and what is read back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import fits
from benchmarks.fits import ComparisonError, Fit, Folders, as_tensor, call_marble, changes_of, fit_all, load_all, read, write
from marble_lightning.lab.runs import Curve, Run

IDENTITY = {"options": ["--a", "1"], "fingerprint": {"configuration": "c", "weights": "w"}}
FIGURES = {"rewards": ["a", "b"], "base": [[0.5, None], [0.25, 1.0]], "trained": [[0.75, None], [0.5, 0.5]]}


@pytest.fixture(name="folders")
def _folders(tmp_path):
    return Folders(tmp_path / "runs", tmp_path / "results")


@pytest.fixture(name="fits_of_two")
def _fits_of_two(monkeypatch):
    monkeypatch.setattr(fits, "fingerprint", lambda arguments: {"configuration": " ".join(arguments), "weights": "w"})
    return [Fit("method", ("-c", "tiny"), ("--a", "1"), seed) for seed in (0, 1)]


def test_a_result_is_read_back(tmp_path):
    file = tmp_path / "folder" / "result.json"
    assert read(file, IDENTITY) is None
    write(file, {**IDENTITY, **FIGURES})
    assert read(file, IDENTITY) == {**IDENTITY, **FIGURES}
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("options", ["--a", "2"], r"the options \['--a', '2'\] instead of \['--a', '1'\]; delete the file"),
        ("fingerprint", {"configuration": "d", "weights": "w"}, "a run with another configuration; delete"),
        ("fingerprint", {"configuration": "d", "weights": "v"}, "another configuration, another weights"),
        ("fingerprint", {}, "another configuration, another weights"),
    ],
)
def test_a_result_of_another_run_is_refused(tmp_path, key, other, message):
    write(tmp_path / "result.json", {**IDENTITY, key: other})
    with pytest.raises(ComparisonError, match=message):
        read(tmp_path / "result.json", IDENTITY)


def test_a_result_of_another_environment_is_refused(tmp_path):
    write(tmp_path / "result.json", {**IDENTITY, "environment": {"OMP_NUM_THREADS": "2"}})
    with pytest.raises(ComparisonError, match="a run with the environment {'OMP_NUM_THREADS': '2'} instead of None"):
        read(tmp_path / "result.json", IDENTITY)


def test_the_environment_is_part_of_what_ran(fits_of_two):
    assert "environment" not in fits_of_two[0].identity
    two = replace(fits_of_two[0], environment=(("OMP_NUM_THREADS", "2"),))
    assert two.identity == {**fits_of_two[0].identity, "environment": {"OMP_NUM_THREADS": "2"}}


def test_only_missing_runs_are_run(fits_of_two, folders, monkeypatch):
    run = []

    def fit_once(fit, folders):
        run.append(fit.seed)
        write(folders.result(fit), {**fit.identity, "seed": fit.seed})

    monkeypatch.setattr(fits, "fit_once", fit_once)
    fit_once(fits_of_two[1], folders)
    assert [result["seed"] for result in load_all(fits_of_two, folders)] == [1]
    assert [result["seed"] for result in fit_all(fits_of_two, folders, jobs=2)] == [0, 1]
    assert [result["seed"] for result in fit_all(fits_of_two, folders, jobs=1)] == [0, 1]
    assert run == [1, 0]


def test_a_wrong_result_is_refused_before_anything_runs(fits_of_two, folders, monkeypatch):
    monkeypatch.setattr(fits, "fit_once", lambda fit, folders: pytest.fail("a run"))
    write(folders.result(fits_of_two[1]), IDENTITY)
    with pytest.raises(ComparisonError, match="seed_1.json must have the figures of this comparison's run"):
        fit_all(fits_of_two, folders, jobs=1)


def test_a_failed_command_is_named_with_its_last_message(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho $OMP_NUM_THREADS $3\necho it went wrong.\necho\nexit 2")
    program.chmod(0o755)
    monkeypatch.setattr(fits.sys, "executable", str(program))
    with pytest.raises(ComparisonError, match=r"exit status 2 of this run, and as its last message: it went wrong\. All"):
        call_marble(["fit"], tmp_path / "output.txt", "this run")
    assert (tmp_path / "output.txt").read_text().startswith("1 fit\n")


def test_changes_are_nan_where_there_is_no_score():
    changes = changes_of([FIGURES, FIGURES], ["b", "a"])
    expected = torch.tensor([[torch.nan, 0.25], [-0.5, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(changes, expected.expand(2, 2, 2), equal_nan=True)
    assert as_tensor([[None, 1.0]]).isnan().tolist() == [[True, False]]


def test_changes_need_the_same_rewards_and_prompts():
    with pytest.raises(ComparisonError, match="All runs must have scores of a, c. Found a run without c"):
        changes_of([FIGURES], ["a", "c"])
    shorter = {**FIGURES, "base": FIGURES["base"][:1], "trained": FIGURES["trained"][:1]}
    with pytest.raises(ComparisonError, match=r"the same held-out prompts. Found runs with \[1, 2\]"):
        changes_of([FIGURES, shorter], ["a"])


class FakeRun:
    """What `figures_of` reads of a run."""

    distance = Run.distance

    def __init__(self, base=True):
        self.reward_models, self.balancer, self.evaluated, self.folder = ["a", "b"], "MARBLE", {"refresh_every": 5}, "run"
        self.base = torch.zeros(2, 2) if base else None
        scores = [{"a": 0.123456}, {"a": 1.0, "b": 2.0}]
        self.results = {"prompts": [{"scores": row, "base": row} for row in scores]}

    def curve(self, name):
        curves = {
            "kl": (list(range(20)), [0.0] * 18 + [0.01, 0.03]),
            "cosine/update/own/a": ([5], [0.1]),
            "cosine/reused/own/a": ([0, 5], [0.98765, 0.5]),
            "cosine/reused/split/a": ([5], [-0.5]),
            "cosine/update/split/a": ([5], [-0.9]),
            "probe/reused/own/chance": ([5, 9], [0.0, 1.0]),
            "signal_to_noise/a": ([5, 9], [0.5, 0.1]),
        }
        return Curve(*curves.get(name, ([], [])))


def test_figures_have_scores_and_the_cosines_of_reused_weights():
    figures = fits.figures_of(FakeRun())
    assert figures["base"] == figures["trained"] == [[0.1235, None], [1.0, 2.0]]
    assert figures["trained_rewards"] == ["a"] and figures["kl"] == 0.02
    assert figures["cosines"] == {"own": [[0.988], [0.5]], "split": [[-0.5]]} and figures["solved"] == [[0.1]]
    assert figures["chance"] == 0.5 and figures["signal_to_noise"] == [0.1]
    assert json.loads(json.dumps(figures)) == figures
    with pytest.raises(ComparisonError, match="num_sanity_val_steps"):
        fits.figures_of(FakeRun(base=False))


def test_a_method_that_solves_on_every_step_has_split_cosines_of_earlier_weights():
    """Those that it has just found depend on the same images."""
    run = FakeRun()
    run.evaluated = {"refresh_every": 1}
    figures = fits.figures_of(run)
    assert figures["cosines"] == {"own": [[0.1]], "split": [[-0.5]]} and "solved" not in figures
