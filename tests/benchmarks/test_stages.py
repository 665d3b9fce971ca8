"""Stages: their rewards, and runs that train on some of them."""

from __future__ import annotations

import json

import pytest

from benchmarks.stages import STAGES, combine, options_of, read_stages, specialists


def settings(rewards, metrics=None, **others):
    model = {"rewards": rewards, "metrics": metrics, **others}
    return {"trainer": {"max_epochs": 7}, "model": model}


def test_rewards_of_all_stages_score_in_every_run():
    stages = combine({"one": settings({"a": 1, "b": 2, "c": None}), "two": settings({"b": 2, "d": 4})})
    assert stages.members == {"one": ["a", "b"], "two": ["b", "d"]}
    assert stages.rounds == 7
    assert stages.union(["two", "one"]) == ["b", "d", "a"]
    *start, overlay = stages.training_on(["b"])
    assert start == ["-c", "tiny", "-c"]
    assert json.loads(overlay) == {"model": {"rewards": {"b": 2}, "metrics": {"a": 1, "d": 4}}}
    assert stages.training_on(["b"], "two")[:4] == ("-c", "tiny", "-c", "stages/two")


def test_metrics_stay():
    stages = combine({"one": settings({"a": 1}, {"m": 3, "n": None})})
    assert json.loads(stages.training_on(["a"])[-1]) == {"model": {"rewards": {"a": 1}, "metrics": {"m": 3}}}


def test_stages_must_share_all_but_rewards():
    with pytest.raises(ValueError, match="Found two, which differs in model"):
        combine({"one": settings({"a": 1}), "two": settings({"a": 1}, sampling=3)})
    with pytest.raises(ValueError, match="same settings of a reward. Found others of a in two"):
        combine({"one": settings({"a": 1}), "two": settings({"a": 2})})


def test_a_specialist_has_the_same_name_on_all_stages():
    stages = combine({"one": settings({"a": 1, "b": 2})})
    fits = specialists(stages, ["a", "b"], [0, 1], options_of(3, ["--x", "1"]), 3)
    assert [(fit.name, fit.seed) for fit in fits] == [
        (f"specialist_{name}_3", seed) for seed in (0, 1) for name in ("a", "b")
    ]
    assert fits[0].options == ("--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "3", "--x", "1")
    assert fits[0].configs[-4:] == ("-c", "balancers/weighted_sum", "--model.objective.advantage_std", "round")


def test_the_stages_of_the_configurations():
    stages = read_stages()
    assert tuple(stages.members) == STAGES
    assert stages.members["published"] == ["pickscore", "hpsv2", "clipscore", "ocr", "geneval"]
    assert stages.members["conflict"] == [*stages.members["published"], "ornament"]
    assert stages.members["aligned"] == ["pickscore", "clipscore", "geneval"]
    assert list(stages.metrics) == ["geneval_accuracy"]
