"""Comparison of runs: whether they are comparable, and one composite score for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from marble_lightning.utils.run_files import ALL

Results = Mapping[str, Any]
"""The content of results.json."""


ROUNDING = 1e-5
"""Means that differ by at most this much count as equal; batch sizes and ranks change them by about a tenth of it."""


def z_scores(means: Float[Tensor, "run reward"]) -> Float[Tensor, "run reward"]:
    """Z-score of each run's mean among the means of all runs, (x - mean) / std, per reward.

    NaN for a reward whose means differ by at most `ROUNDING`.

    >>> z_scores(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [[-1.0, nan], [1.0, nan]]
    """
    agree = means.amax(0) - means.amin(0) <= ROUNDING
    return (means - means.mean(0)) / torch.where(agree, torch.nan, means.std(0, correction=0))


def compare_runs(runs: Mapping[str, Results], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Means of each run over all prompts, their z-scores among the runs, and the mean z-score, the composite.

    Args:
        runs: By name; all must have the settings and prompts of the first one.
        columns: Rewards and metrics.

    Raises:
        ValueError: As `check_comparable`.

    Source: MARBLE, arXiv 2605.06507, the composite of its main table.
    """
    first, *others = runs.items()
    for name, results in [first, *others]:
        check_comparable(first[1], results, name, columns)
    means = torch.tensor([[run[ALL][column]["mean"] for column in columns] for run in runs.values()], dtype=torch.float64)
    rows = []
    for name, run_means, scores in zip(runs, means.tolist(), z_scores(means), strict=True):
        z = {column: score for column, score in zip(columns, scores.tolist(), strict=True) if score == score}
        composite = sum(z.values()) / len(z) if z else None
        rows.append(
            {"run": name, "composite": composite, "means": dict(zip(columns, run_means, strict=True)), "z_scores": z}
        )
    return rows


def check_comparable(this: Results, other: Results, name: str, columns: Sequence[str]) -> None:
    """Check that another run was sampled with the same settings from the same prompts, and has all columns.

    Args:
        this: Settings and prompts of this run.
        other: Results of the other run.
        name: Name or path of the other run, for the error message.
        columns: Rewards and metrics.

    Raises:
        ValueError: The runs differ; the message names the differences.
    """
    differences = evaluation_differences(this, other, columns)
    if differences:
        raise ValueError(
            f"`results.compare_with` must name runs evaluated like this one. Found {name} with {', '.join(differences)}; "
            "evaluate both with the same `evaluation` settings and held-out prompts."
        )
    missing = [column for column in columns if other[ALL].get(column, {"mean": None})["mean"] is None]
    if missing:
        raise ValueError(
            f"`results.compare_with` must name runs with a score of every reward compared. Found none of "
            f"{', '.join(missing)} in {name}; name others under `results.columns`, or evaluate it with this run's rewards."
        )


def evaluation_differences(this: Results, other: Results, columns: Sequence[str]) -> list[str]:
    """What prevents a comparison of two runs: other settings of sampling, classes of reward models, or prompts.

    Args:
        this: Settings and prompts of this run.
        other: Results of the other run.
        columns: Rewards and metrics.
    """
    keys = dict.fromkeys([*this["settings"], *other["settings"]])
    pairs = {key: (other["settings"].get(key), this["settings"].get(key)) for key in keys}
    differences = [
        f"{key} {actual} instead of {expected}" for key, (actual, expected) in pairs.items() if actual != expected
    ]
    for column, (actual, expected) in _common_reward_models(this, other, columns).items():
        if actual["class"] != expected["class"]:
            differences.append(f"{column} by {actual['class']} instead of {expected['class']}")
    actual_prompts, expected_prompts = (
        [(prompt["index"], prompt["set"], prompt["prompt"]) for prompt in run["prompts"]] for run in (other, this)
    )
    if len(actual_prompts) != len(expected_prompts):
        differences.append(f"{len(actual_prompts)} prompts instead of {len(expected_prompts)}")
    elif actual_prompts != expected_prompts:
        pairs_of_prompts = zip(actual_prompts, expected_prompts, strict=True)
        actual, expected = next(pair for pair in pairs_of_prompts if pair[0] != pair[1])
        differences.append(
            f"prompt {actual[0]} {actual[2]!r} of {actual[1]!r} "
            f"instead of prompt {expected[0]} {expected[2]!r} of {expected[1]!r}"
        )
    return differences


def scorer_differences(this: Results, other: Results, columns: Sequence[str]) -> list[str]:
    """Settings in which the reward models of another run differ from this run's, such as the path of their weights.

    Args:
        this: Results of this run.
        other: Results of the other run; results without reward models count as equal.
        columns: Rewards and metrics.
    """
    return [
        f"{column}.{name} {actual.get(name)} instead of {expected.get(name)}"
        for column, (actual, expected) in _common_reward_models(this, other, columns).items()
        for name in dict.fromkeys([*expected, *actual])
        if actual.get(name) != expected.get(name)
    ]


def _common_reward_models(this: Results, other: Results, columns: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Reward models of the columns that both runs have: the other run's, then this run's."""
    actual, expected = (run.get("reward_models", {}) for run in (other, this))
    return {column: (actual[column], expected[column]) for column in columns if column in actual and column in expected}
