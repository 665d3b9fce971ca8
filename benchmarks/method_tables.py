"""Tables that compare methods by their held-out changes, normalised gains and cosines. Pure functions of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from balancers.gramian import in_conflict
from benchmarks.fits import Result, as_tensor, changes_of
from benchmarks.stage_tables import number, table
from marble_lightning.evaluation.cells import of_changes, of_interval, of_p_value, of_summary
from marble_lightning.evaluation.gains import GainsComparison, Specialists, compare_gains, gains_of_runs, normalised_gains
from marble_lightning.evaluation.statistics import holm, interquartile_mean, summarise_runs

Results = Mapping[str, Mapping[int, Result]]
"""Figures of runs by method and seed."""


def changes_table(results: Results, names: Sequence[str], level: float = 0.95) -> str:
    """Held-out change of each reward by method, the distance to the base at the end (`kl`), and the minutes of a run.

    The change is a mean with its interval over seeds and prompts, or for a single seed with its standard error.

    Args:
        results: Figures of runs.
        names: Rewards and metrics of the columns.
        level: Confidence of the intervals, in (0, 1).
    """
    rows = []
    for method, runs in results.items():
        cells = [of_changes(column, level) for column in changes_of(list(runs.values()), names).unbind(2)]
        minutes = sum(run["seconds"] for run in runs.values()) / len(runs) / 60
        distances = [run["kl"] for run in runs.values() if run["kl"] is not None]
        kl = sum(distances) / len(distances) if distances else None
        rows.append([method, str(len(runs)), *cells, number(kl, ".3f"), f"{minutes:.1f}"])
    return table(["method", "seeds", *names, "kl", "minutes"], rows)


def cadences(results: Results) -> str:
    """The balancer and cadence of each method, one line for each distinct cadence of its runs."""
    lines = {f"- {method}: {run['balancer']}": None for method, runs in results.items() for run in runs.values()}
    return "\n".join(lines)


def stack_specialists(runs: Mapping[str, Sequence[Result]]) -> Specialists:
    """Changes of each reward by its specialists, with as many seeds as the reward with the fewest has.

    Args:
        runs: Figures of the runs trained on each reward alone; at least one each.
    """
    seeds = min(map(len, runs.values()))
    return torch.stack([changes_of(of_reward[:seeds], [name])[:, :, 0] for name, of_reward in runs.items()], dim=2)


def gains_table(results: Results, names: Sequence[str], specialists: Specialists) -> str:
    """Normalised gains of each method: the least with its reward, the mean, the interquartile mean of its runs, then all.

    A dash stands for a reward whose specialist gains less than 3 standard errors; it does not count.

    Args:
        results: Figures of runs.
        names: The rewards that the methods train on.
        specialists: Changes by the specialists, with these rewards as columns.
    """
    rows = []
    for method, runs in results.items():
        changes = changes_of(list(runs.values()), names)
        gains = normalised_gains(changes, specialists).tolist()
        defined = {name: gain for name, gain in zip(names, gains, strict=True) if gain == gain}
        least = min(defined, key=lambda name: defined[name], default=None)
        first = "-" if least is None else f"{defined[least]:+.2f} ({least})"
        mean = sum(defined.values()) / len(defined) if defined else None
        of_runs = gains_of_runs(changes, specialists)
        middle = interquartile_mean(of_runs[of_runs.isfinite()]) if defined else None
        cells = (number(gain, "+.2f") for gain in (mean, middle, *map(defined.get, names)))
        rows.append([method, str(len(runs)), first, *cells])
    return table(["method", "seeds", "least gain", "mean gain", "interquartile mean", *names], rows)


def difference_table(results: Results, against: str, names: Sequence[str], specialists: Specialists) -> str:
    """Differences of each method's least and mean normalised gain to those of another method, with 99 % intervals.

    `p, Holm` is the p-value of equal least gains, corrected for the number of methods in the table. `better` is how often
    a run's mean gain is above that of a run of the other method. Only seeds that both methods have are compared.

    Args:
        results: Figures of runs.
        against: The method to compare with.
        names: The rewards that the methods train on.
        specialists: As in `gains_table`.
    """
    rows, found, other = [], dict[str, GainsComparison](), results[against]
    for method, runs in results.items():
        seeds = [seed for seed in runs if seed in other]
        if method == against:
            continue
        if min(len(seeds), len(specialists)) < 2:
            rows.append([method, str(len(seeds)), "needs 2 seeds of both methods and of the specialists", "-", "-", "-"])
            continue
        one, two = (changes_of([of_method[seed] for seed in seeds], names) for of_method in (runs, other))
        found[method] = compare_gains(one, two, specialists)
        rows.append([method, str(len(seeds))])
    corrected = iter(holm(torch.tensor([gains.least.p_value for gains in found.values()])).tolist())
    for row in rows:
        if gains := found.get(row[0]):
            least, mean = (of_interval(interval, 3) for interval in (gains.least, gains.mean))
            row += [least, of_p_value(next(corrected)), mean, f"{gains.better:.0%}"]
    titles = [f"least gain - that of {against}, 99 % interval", "p, Holm", "mean gain - its mean gain", "better"]
    return table(["method", "seeds", *titles], rows)


def cosines_table(results: Results, names: Sequence[str]) -> str:
    """Mean cosine of a method's updates with each reward's gradient ± standard error over seeds, or of one seed's refreshes.

    `own` are cosines on the images that the update comes from, and `own, just solved` those of the weights that a refresh
    has just found, before most steps reuse them. `split` are cosines by products of halves. The last columns are how often
    the least cosine of a refresh is negative, and how often it would be by chance, without any signal. A dash stands for
    figures that an older result does not have. `signal / noise` is the ratio of the norms of a gradient's signal and noise
    in one step, at the end of a run: the median over seeds.

    Args:
        results: Figures of runs.
        names: The rewards that the methods train on.
    """
    rows = []
    for (method, runs), place in product(results.items(), ("own", "solved", "split", "signal / noise")):
        having = [run for run in runs.values() if run["trained_rewards"]]
        if place == "signal / noise":
            if any(shown := [ratio_of(having, name) for name in names]):
                rows.append([method, place, "-", *(number(ratio, ".2f") for ratio in shown), "-", "-"])
            continue
        of_runs = [cosines_of(run, place, names) for run in having]
        if not of_runs or not len(cosines := torch.cat(of_runs)):
            continue
        complete = cosines[cosines.isfinite().all(1)]
        opposed = [in_conflict(least) for least in complete.amin(1).tolist()] if len(complete) else []
        conflicts = f"{sum(opposed) / len(opposed):.0%}" if opposed else "-"
        chances = [run["chance"] for run in having if "chance" in run]
        chance = f"{sum(chances) / len(chances):.0%}" if place == "split" and chances else "-"
        cells = [of_summary(summarise_runs(columns), 3) for columns in zip(*(run.unbind(1) for run in of_runs), strict=True)]
        title = "own, just solved" if place == "solved" else place
        rows.append([method, title, str(len(cosines)), *cells, conflicts, chance])
    return table(["method", "products", "refreshes", *names, "conflicts", "by chance"], rows)


def ratio_of(runs: Sequence[Result], name: str) -> float | None:
    """The median over runs of a reward's last signal-to-noise ratio; None if no run has recorded one."""
    recorded = [dict(zip(run["trained_rewards"], run.get("signal_to_noise", []), strict=False)).get(name) for run in runs]
    ratios = [ratio for ratio in recorded if ratio is not None]
    return median(ratios) if ratios else None


def cosines_of(run: Result, place: str, names: Sequence[str]) -> Float[Tensor, "refresh reward"]:
    """Cosines of a run's updates with each of these rewards' gradients; NaN for those that it has none of."""
    found = run.get("solved", []) if place == "solved" else run["cosines"][place]
    rows, trained = as_tensor(found), run["trained_rewards"]
    if not len(rows):
        return torch.empty(0, len(names), dtype=torch.float64)
    missing = torch.full_like(rows[:, 0], torch.nan)
    return torch.stack([rows[:, trained.index(name)] if name in trained else missing for name in names], dim=1)
