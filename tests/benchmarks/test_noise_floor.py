"""The noise floor's table, and the runs that it compares."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import noise_floor
from benchmarks.noise_floor import ROUNDINGS, main, noise_table
from tests.benchmarks.test_method_tables import result


def shifted(by):
    """Scores whose changes are `by` more than 0.1, 0.2, 0.3 and 0.4 for reward a; reward b applies to the first two."""
    changes = [[0.1 + by, 1.0], [0.2 + by, 1.0], [0.3 + by, None], [0.4 + by, None]]
    return {"rewards": ["a", "b"], "base": [[0.0, 0.0]] * 2 + [[0.0, None]] * 2, "trained": changes}


def test_each_source_of_variation_has_its_column():
    table = noise_table([shifted(0.0), shifted(0.02)], {"threads_2": shifted(0.001)}, ["a", "b"]).splitlines()
    assert table[0] == "| reward | change | std over seeds | error over prompts | threads_2 |"
    error = float(torch.tensor([0.1, 0.2, 0.3, 0.4]).std()) / 2
    assert table[2] == f"| a | +0.2600 | {0.02 / 2**0.5:.4f} | {error:.4f} | +0.0010 |"
    assert table[3] == "| b | +1.0000 | 0.0000 | 0.0000 | +0.0000 |"


def test_a_single_seed_has_no_deviation():
    assert "| a | +0.2500 | - |" in noise_table([shifted(0.0)], {"threads_2": shifted(0.0)}, ["a", "b"])


def test_the_first_seed_runs_again_with_each_rounding(monkeypatch, capsys, tmp_path):
    def fit_all(fits, folders, jobs):
        assert [(fit.name, fit.seed) for fit in fits] == [
            *[("published_split_3", seed) for seed in (7, 8)],
            *[(f"published_split_3_{name}", 7) for name in ROUNDINGS],
        ]
        assert [dict(fit.environment) for fit in fits] == [{}, {}, *ROUNDINGS.values()]
        assert {(fit.configs, fit.options) for fit in fits} == {(fits[0].configs, fits[0].options)}
        assert "--balancer.gram" in fits[0].options
        assert jobs == 2
        rewards = ("pickscore", "hpsv2", "clipscore", "ocr", "geneval", "geneval_accuracy")
        return [result([0.1] * 6, fit.seed, names=rewards) for fit in fits]

    monkeypatch.setattr(noise_floor, "fit_all", fit_all)
    options = ["--method", "split", "--seeds", "7", "8", "--rounds", "3", "--jobs", "2", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["noise_floor", *options])
    main()
    assert "| pickscore | +0.1" in capsys.readouterr().out


def test_a_failed_run_ends_the_command(monkeypatch, tmp_path):
    def fit_all(fits, folders, jobs):
        raise noise_floor.ComparisonError("it went wrong")

    monkeypatch.setattr(noise_floor, "fit_all", fit_all)
    monkeypatch.setattr(sys, "argv", ["noise_floor", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: it went wrong"):
        main()
