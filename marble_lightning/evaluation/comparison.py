"""Runs side by side: which may be compared, and one number for each over all rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from marble_lightning.data.datamodule import ALL

Results = Mapping[str, Any]
"""What results.json holds."""


ROUNDING = 1e-5
"""Means that are nearer than this agree: batch sizes and ranks alone move them by up to about a tenth of it."""


def z_scores(means: Float[Tensor, "run reward"]) -> Float[Tensor, "run reward"]:
    """How many standard deviations each run's mean is from that of all runs, (x - mean) / std, reward by reward.

    A reward on which all runs agree, but for `ROUNDING`, tells none from another: NaN.

    >>> z_scores(torch.tensor([[1.0, 5.0], [3.0, 5.0]])).tolist()
    [[-1.0, nan], [1.0, nan]]
    """
    agree = means.amax(0) - means.amin(0) <= ROUNDING
    return (means - means.mean(0)) / torch.where(agree, torch.nan, means.std(0, correction=0))


def compared(runs: Mapping[str, Results], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Each run's means over all prompts, their z-scores over the runs, and the mean of those, the composite.

    Args:
        runs: By name; the first one's settings and prompts are the measure.
        columns: Rewards and metrics.

    Source: MARBLE, arXiv 2605.06507, the composite of its main table.

    Raises:
        ValueError: As `check_comparable`.
    """
    first, *others = runs.items()
    for name, results in [first, *others]:
        check_comparable(first[1], results, name, columns)
    means = torch.tensor([[run[ALL][column]["mean"] for column in columns] for run in runs.values()], dtype=torch.float64)
    found = []
    for name, own, scores in zip(runs, means.tolist(), z_scores(means), strict=True):
        z = {column: score for column, score in zip(columns, scores.tolist(), strict=True) if score == score}
        composite = sum(z.values()) / len(z) if z else None
        found.append({"run": name, "composite": composite, "means": dict(zip(columns, own, strict=True)), "z_scores": z})
    return found


def check_comparable(ours: Results, theirs: Results, name: str, columns: Sequence[str]) -> None:
    """Another run was sampled with the same settings from the same prompts, and has all columns.

    Args:
        ours: Settings and prompts of this run.
        theirs: Results of the other one.
        name: Where they were found.
        columns: Rewards and metrics.

    Raises:
        ValueError: With what differs.
    """
    keys = dict.fromkeys([*ours["settings"], *theirs["settings"]])
    pairs = {key: (theirs["settings"].get(key), ours["settings"].get(key)) for key in keys}
    differences = [f"{key} {other} instead of {own}" for key, (other, own) in pairs.items() if other != own]
    for column, (other, own) in _common_reward_models(ours, theirs, columns).items():
        if other["class"] != own["class"]:
            differences.append(f"{column} by {other['class']} instead of {own['class']}")
    found, wanted = ([(each["index"], each["set"], each["prompt"]) for each in run["prompts"]] for run in (theirs, ours))
    if len(found) != len(wanted):
        differences.append(f"{len(found)} prompts instead of {len(wanted)}")
    elif found != wanted:
        other, own = next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
        differences.append(
            f"prompt {other[0]} {other[2]!r} of {other[1]!r} instead of prompt {own[0]} {own[2]!r} of {own[1]!r}"
        )
    if differences:
        raise ValueError(
            f"`results.compare_with` must name runs measured as this one is. Found {name} with {', '.join(differences)}; "
            "measure both with the same `evaluation` settings and held-out prompts."
        )
    missing = [column for column in columns if theirs[ALL].get(column, {"mean": None})["mean"] is None]
    if missing:
        raise ValueError(
            f"`results.compare_with` must name runs with a score of every reward compared. Found none of "
            f"{', '.join(missing)} in {name}; name others under `results.columns`, or measure it with this run's rewards."
        )


def scorer_differences(ours: Results, theirs: Results, columns: Sequence[str]) -> list[str]:
    """In which settings the judges of another run differ from ours, such as where their weights are from.

    Args:
        ours: Judges of this run.
        theirs: Results of the other one; where they do not say, nothing differs.
        columns: Rewards and metrics.
    """
    return [
        f"{column}.{name} {other.get(name)} instead of {own.get(name)}"
        for column, (other, own) in _common_reward_models(ours, theirs, columns).items()
        for name in dict.fromkeys([*own, *other])
        if other.get(name) != own.get(name)
    ]


def _common_reward_models(ours: Results, theirs: Results, columns: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Their judge and ours of each column that both know of."""
    other, own = (run.get("judges", {}) for run in (theirs, ours))
    return {column: (other[column], own[column]) for column in columns if column in other and column in own}
