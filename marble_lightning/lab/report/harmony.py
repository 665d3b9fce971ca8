"""Tables of gradients: cosines of the update with each reward's gradient, and their signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import pandas
import torch

from marble_lightning.evaluation.statistics import summarise
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.runs import Run

CHANCE = (
    "harmony/split/chance",
    *(f"probe/{kind}/{place}/chance" for kind in ("reused", "solved") for place in ("split", "own")),
)
"""Curves of the share of conflicts without any signal: of refreshes, or of probes for balancers without refreshes."""


def harmony_of_methods(found: Collection) -> pandas.DataFrame:
    """Mean cosines of each method's update with each reward's gradient, on its own images and by products of halves.

    `conflicts` is how often the least of a step is negative, `by chance` what a direction without any signal would have.
    """
    rows = [
        {"method": name, **row}
        for name, seeds in found.methods.items()
        for row in cosines(found.rewards, list(seeds.values()))
    ]
    return pandas.DataFrame(rows).fillna("")


def harmony_of_runs(found: Collection) -> pandas.DataFrame:
    """The same for each run, and its signal-to-noise ratios at its end in a third row."""
    rows: list[dict[str, Any]] = []
    for method, seeds in found.methods.items():
        for seed, run in seeds.items():
            named = {"method": method, "seed": seed}
            rows += [{**named, **row} for row in cosines(found.rewards, [run])]
            if ratios := signal_to_noise(found.rewards, [run]):
                rows.append({**named, "products": "signal / noise", **ratios})
    return pandas.DataFrame(rows) if rows else pandas.DataFrame(columns=["method", "seed"])


def cosines(rewards: Sequence[str], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each kind of products that some runs have logged."""
    chance = next((values for name in CHANCE if (values := logged(runs, name))), [])
    rows = []
    for place in ("own", "split"):
        kinds = ("reused", "update")
        kind = next((kind for kind in kinds if any(logged(runs, f"cosine/{kind}/{place}/{name}") for name in rewards)), None)
        if kind is None:
            continue
        by_reward = {name: logged(runs, f"cosine/{kind}/{place}/{name}") for name in rewards}
        least = [value for run in runs for value in least_of_steps(run, f"cosine/{kind}/{place}", rewards)]
        means = {name: summarise(torch.tensor(values)) for name, values in by_reward.items() if values}
        rows.append(
            {
                "products": place,
                "steps": len(least),
                **{name: f"{of_reward.mean:+.3f} ± {of_reward.error:.3f}" for name, of_reward in means.items()},
                "conflicts": f"{mean(value < 0 for value in least):.0%}",
                "by chance": f"{mean(chance):.0%}" if chance else "",
            }
        )
    return rows


def least_of_steps(run: Run, prefix: str, rewards: Sequence[str]) -> list[float]:
    """The least cosine of each step, over the rewards that have one."""
    least: dict[int, float] = {}
    for name in rewards:
        for step, value in zip(*run.curve(f"{prefix}/{name}"), strict=True):
            least[step] = min(value, least.get(step, value))
    return list(least.values())


def noise(found: Collection) -> pandas.DataFrame:
    """Signal-to-noise ratio of each reward's gradient in one step, at the end of the runs: the median over seeds."""
    rows = {method: signal_to_noise(found.rewards, list(seeds.values())) for method, seeds in found.methods.items()}
    return pandas.DataFrame.from_dict({method: row for method, row in rows.items() if row}, orient="index").fillna("")


def signal_to_noise(rewards: Sequence[str], runs: Sequence[Run]) -> Mapping[str, str]:
    """The median over runs of the last ratio of each reward that has one."""
    last = {name: [value for run in runs for value in run.curve(f"signal_to_noise/{name}").values[-1:]] for name in rewards}
    return {name: f"{median(values):.2f}" for name, values in last.items() if values}


def logged(runs: Sequence[Run], name: str) -> list[float]:
    """All values that the runs logged under a name."""
    return [value for run in runs for value in run.curve(name).values]
