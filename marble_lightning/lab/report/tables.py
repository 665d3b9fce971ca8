"""The tables of a report."""

from __future__ import annotations

from statistics import mean, median

import pandas
import torch
from jaxtyping import Bool
from torch import Tensor

from marble_lightning.evaluation.cells import of_changes, of_interval, of_p_value
from marble_lightning.evaluation.gains import GainsComparison, compare_gains, gains_of_runs, normalised_gains
from marble_lightning.evaluation.image_statistics import NAMES
from marble_lightning.evaluation.statistics import (
    crossed_interval,
    holm,
    interquartile_mean,
    probability_of_improvement,
    scored_by_all,
)
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.report.collect import changes as changes_of
from marble_lightning.lab.runs import Run

PHASES = ("sampling", "waiting_for_scores", "training")
LEAST_SEEDS = 5
"""Common seeds that a verdict needs; intervals of fewer are too narrow."""


def scores(found: Collection) -> pandas.DataFrame:
    """Tidy data: one row for each method, seed, prompt and reward or metric."""
    rows = []
    for method, seeds in {**found.methods, **{f"{name} alone": runs for name, runs in found.specialists.items()}}.items():
        for seed, run in seeds.items():
            for prompt in run.results["prompts"]:
                for name, after in prompt["scores"].items():
                    of_prompt = {"source": prompt["set"], "prompt": prompt["prompt"], "index": prompt["index"]}
                    before = prompt["base"].get(name)
                    rows.append(
                        {"method": method, "seed": seed, **of_prompt, "reward": name, "base": before, "trained": after}
                    )
    return pandas.DataFrame(rows)


def methods(found: Collection) -> pandas.DataFrame:
    """What ran: seeds, rewards, balancer with its cadence, optimizer steps, time, and peak memory of a run."""
    rows = {}
    for method, seeds in found.methods.items():
        run = next(iter(seeds.values()))
        rows[method] = {
            "seeds": ", ".join(map(str, seeds)),
            "rewards": ", ".join(run.rewards),
            "balancer": run.balancer,
            "optimizer steps": run.evaluated.get("optimizer_step"),
            "distance to the base": distance(list(seeds.values())),
            "seconds a round": round(median(seconds_of_round(run) for run in seeds.values()), 1),
            "hours a run": float(f"{median(hours_of_rounds(run) for run in seeds.values()):.3g}"),
            "peak memory": memory(list(seeds.values())),
        }
    return pandas.DataFrame.from_dict(rows, orient="index")


def distance(runs: list[Run]) -> str:
    """Mean distance to the base at the end of runs, which gains are to be seen beside; empty if none has recorded it."""
    distances = [run.distance for run in runs if run.distance is not None]
    return f"{mean(distances):.4f}" if distances else ""


def seconds_of_round(run: Run) -> float:
    """Median time of a round."""
    return sum(median(values) for phase in PHASES if (values := run.curve(f"time/{phase}").values))


def hours_of_rounds(run: Run) -> float:
    """Time of all rounds together, of all parts of a resumed run; a round that was done again counts once."""
    return sum(sum(run.curve(f"time/{phase}").values) for phase in PHASES) / 3600


def memory(runs: list[Run]) -> str:
    """Median peak memory of runs, of the GPU or of the process; empty if none has recorded it."""
    recorded = [run.peak_memory for run in runs if run.peak_memory is not None]
    by_kind = {kind: [peak["gib"] for peak in recorded if peak["of"] == kind] for kind in ("GPU", "process")}
    return ", ".join(f"{median(peaks):.2f} GiB ({kind})" for kind, peaks in by_kind.items() if peaks)


def changes(found: Collection) -> pandas.DataFrame:
    """Held-out change of each reward and metric, with its 95 % interval over seeds and prompts.

    `prompts` is the number of prompts with a score.
    """
    prompts = scored(found).sum(0).tolist()
    rows = {"base": {name: f"{float(base):.4f}" for name, base in zip(found.columns, base_means(found), strict=True)}}
    for method in found.methods:
        columns = found.changes(method).unbind(2)
        rows[method] = {name: of_changes(column) for name, column in zip(found.columns, columns, strict=True)}
    rows["prompts"] = {name: str(count) for name, count in zip(found.columns, prompts, strict=True)}
    return pandas.DataFrame.from_dict(rows, orient="index")


def scored(found: Collection) -> Bool[Tensor, "prompt column"]:
    """Which prompts have a score in any run."""
    return torch.stack([changes_of(run, found.columns).isfinite() for run in found.runs]).any(0)


def left_out(found: Collection) -> list[str]:
    """Prompts that means and intervals of a method leave out, since a seed has no score, though some run has one."""
    groups = {method: found.changes(method) for method in found.methods}
    if (specialists := found.changes_of_specialists()) is not None:
        groups["the runs on single rewards"] = specialists
    sentences = []
    for group, of_group in groups.items():
        columns = scored(found)[:, : of_group.shape[2]]
        missing = (columns & ~of_group.isfinite().all(0)).sum(0).tolist()
        counts = zip(missing, columns.sum(0).tolist(), found.columns, strict=False)  # specialists have no metrics
        sentences += [f"{count} of {of} prompts of {name} by {group}" for count, of, name in counts if count]
    return sentences


def base_means(found: Collection) -> Tensor:
    """Mean held-out scores of the base; runs of one machine and seed of evaluation have the same."""
    means = []
    for run in found.runs:
        order = [run.reward_models.index(name) for name in found.columns]
        assert run.base is not None
        means.append(run.base[:, order].nanmean(0))
    return torch.stack(means).mean(0)


def gains(found: Collection, reference: str) -> pandas.DataFrame | None:
    """Normalised gains, the least first, and the differences to the reference with 99 % intervals.

    `p (Holm)` is that of equal least gains. None if there are no specialists.
    """
    specialists = found.changes_of_specialists()
    if specialists is None:
        return None
    count, rows, beside = len(found.rewards), dict[str, dict[str, str]](), dict[str, GainsComparison]()
    for method, seeds in found.methods.items():
        changes = found.changes(method)[:, :, :count]
        of_rewards, of_runs = normalised_gains(changes, specialists), gains_of_runs(changes, specialists)
        known = of_runs[of_runs.isfinite()]
        rows[method] = {
            "least": f"{float(of_rewards[of_rewards.isfinite()].min()):+.2f}" if len(known) else "",
            "mean": f"{float(of_rewards.nanmean()):+.2f}" if len(known) else "",
            "interquartile mean": f"{interquartile_mean(known):+.2f}" if len(known) else "",
            **{
                name: f"{gain:+.2f}" if gain == gain else "-"
                for name, gain in zip(found.rewards, of_rewards.tolist(), strict=True)
            },
        }
        common = [seed for seed in seeds if seed in found.methods[reference]]
        if method != reference and min(len(common), len(specialists)) > 1 and len(known):
            one, other = (found.changes(name, common)[:, :, :count] for name in (method, reference))
            beside[method] = compare_gains(one, other, specialists)
    corrected = holm(torch.tensor([gains.least.p_value for gains in beside.values()])).tolist()
    for (method, gains), p_value in zip(beside.items(), corrected, strict=True):
        rows[method] |= {
            f"least - {reference}'s": of_interval(gains.least, 3),
            "p (Holm)": of_p_value(p_value),
            f"mean - {reference}'s": of_interval(gains.mean, 3),
            "better": f"{gains.better:.0%}",
        }
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("")


def verdicts(found: Collection, reference: str) -> pandas.DataFrame:
    """Each method beside the reference: paired difference, probability of improvement, p-value by Holm over the table.

    With fewer than `LEAST_SEEDS` common seeds the verdict is `too few seeds`. A reward with scores on fewer than two prompts
    has no row.
    """
    rows = []
    for method, seeds in found.methods.items():
        common = [seed for seed in seeds if seed in found.methods[reference]]
        if method == reference or len(common) < 2:
            continue
        one, other = found.changes(method, common), found.changes(reference, common)
        for index, name in enumerate(found.columns):
            means = [changes[:, :, index].nanmean(1) for changes in (one, other)]
            difference = scored_by_all((one - other)[:, :, index])
            if difference.shape[1] < 2:  # no interval
                continue
            interval = crossed_interval(difference)
            rows.append(
                {
                    "method": method,
                    "reward": name,
                    "seeds": len(common),
                    "prompts": difference.shape[1],
                    "difference": of_interval(interval),
                    "probability of improvement": round(probability_of_improvement(*means), 2),
                    "p": interval.p_value,
                    "sign": interval.mean,
                }
            )
    if not rows:
        return pandas.DataFrame()
    frame = pandas.DataFrame(rows)
    frame["p (Holm)"] = holm(torch.tensor(frame["p"].to_numpy())).numpy()
    better = frame["sign"].map(lambda sign: "better" if sign > 0 else "worse")
    verdict = better.where(frame["p (Holm)"] <= 0.05, "not separable")
    frame["verdict"] = verdict.where(frame["seeds"] >= LEAST_SEEDS, "too few seeds")
    return frame.drop(columns="sign").round({"p": 4, "p (Holm)": 4})


def images(found: Collection) -> pandas.DataFrame:
    """Image statistics of the last tenth of the rounds, divided by those of the first round."""
    rows = {}
    for method, seeds in found.methods.items():
        row = {}
        for name in NAMES:
            curves = [values for run in seeds.values() if (values := run.curve(f"images/{name}").values)]
            if curves:
                ratios = [factor(values[0], mean(values[-max(1, len(values) // 10) :])) for values in curves]
                row[name] = f"x {sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows[method] = row
    return pandas.DataFrame.from_dict(rows, orient="index")


def factor(first: float, last: float) -> float:
    """How many times the first figure the last one is; 1 if both are 0, infinite if only the first is.

    >>> factor(0.5, 1.0), factor(0.0, 0.0), factor(0.0, 0.1)
    (2.0, 1.0, inf)
    """
    if first == 0:
        return 1.0 if last == 0 else float("inf")
    return last / first
