"""Tables of gradients: cosines of the update with each reward's gradient, and their signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import pandas
import torch

from balancers.gramian import in_conflict
from marble_lightning.evaluation.cells import of_summary
from marble_lightning.evaluation.statistics import summarise_runs
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.runs import Run

PLACES = ("own", "split")
"""Kinds of products: on the images that an update came from, and of halves of them, which share no noise."""
CHANCE = (
    "harmony/split/chance",
    *(f"probe/{kind}/{place}/chance" for kind in ("reused", "solved") for place in ("split", "own")),
)
"""Curves of the share of conflicts without any signal: of refreshes, or of probes for balancers without refreshes."""


def harmony_of_methods(found: Collection) -> pandas.DataFrame:
    """Mean cosines of each method's update with each reward's gradient, on its own images and by products of halves.

    `weights` says whose cosines: of the update that a step has solved, or of weights that are reused until the next refresh.
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
    chance, rows = chance_of(runs), []
    for place in PLACES:
        least, kind = least_of_steps(rewards, runs, place), weights_of(rewards, runs, place)
        if least.empty:
            continue
        curves = {name: [run.curve(f"cosine/{kind}/{place}/{name}").values for run in runs] for name in rewards}
        means = {name: summarise_runs([torch.tensor(values) for values in of_runs]) for name, of_runs in curves.items()}
        rows.append(
            {
                "products": place,
                "weights": kind,
                "steps": len(least),
                **{name: of_summary(summary, 3) for name, summary in means.items() if summary.n},
                "conflicts": f"{least.map(in_conflict).mean():.0%}",
                "by chance": "" if chance.empty else f"{chance.mean():.0%}",
            }
        )
    return rows


def weights_of(rewards: Sequence[str], runs: Sequence[Run], place: str) -> str:
    """The weights of most steps of a method: `reused` ones if not all steps solve and there are cosines of them.

    By products of halves they are the reused ones wherever there are any, since weights just solved for follow the noise.
    """
    reuses = place == "split" or runs[0].evaluated.get("refresh_every", 1) > 1
    has_reused = any(run.curve(f"cosine/reused/{place}/{name}").values for run in runs for name in rewards)
    return "reused" if reuses and has_reused else "update"


def chance_of(runs: Sequence[Run]) -> pandas.Series[float]:
    """The share of conflicts without any signal, by step, of all runs."""
    return next((values for name in CHANCE if len(values := logged(runs, name))), pandas.Series(dtype=float))


def least_of_steps(rewards: Sequence[str], runs: Sequence[Run], place: str) -> pandas.Series[float]:
    """The least cosine of each step and run, over the rewards that have one, by step."""
    kind = weights_of(rewards, runs, place)
    of_runs = [
        pandas.DataFrame({name: logged([run], f"cosine/{kind}/{place}/{name}") for name in rewards}).min(axis=1)
        for run in runs
    ]
    return pandas.concat(of_runs)


def noise(found: Collection) -> pandas.DataFrame:
    """Signal-to-noise ratio of each reward's gradient in one step, at the end of the runs: the median over seeds."""
    rows = {method: signal_to_noise(found.rewards, list(seeds.values())) for method, seeds in found.methods.items()}
    return pandas.DataFrame.from_dict({method: row for method, row in rows.items() if row}, orient="index").fillna("")


def signal_to_noise(rewards: Sequence[str], runs: Sequence[Run]) -> Mapping[str, str]:
    """The median over runs of the last ratio of each reward that has one."""
    last = {name: [value for run in runs for value in run.curve(f"signal_to_noise/{name}").values[-1:]] for name in rewards}
    return {name: f"{median(values):.2f}" for name, values in last.items() if values}


def logged(runs: Sequence[Run], name: str) -> pandas.Series[float]:
    """All values that the runs logged under a name, by step."""
    curves = [run.curve(name) for run in runs]
    steps, values = ([item for curve in curves for item in curve[part]] for part in range(2))
    return pandas.Series(values, index=steps, dtype=float)
