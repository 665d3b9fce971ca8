"""The tables of a report."""

from __future__ import annotations

from statistics import median

import pandas
import torch
from torch import Tensor

from marble_lightning.evaluation.gains import least_gain_difference, normalised_gains
from marble_lightning.evaluation.image_statistics import NAMES
from marble_lightning.evaluation.statistics import (
    Interval,
    crossed_interval,
    crossed_p_value,
    holm,
    interquartile_mean,
    probability_of_improvement,
    summarise,
)
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.runs import Run

PHASES = ("sampling", "waiting_for_scores", "training")


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
    """What ran: seeds, rewards, balancer with its cadence, optimizer steps, seconds of a round, peak memory of a run."""
    rows = {}
    for method, seeds in found.methods.items():
        run = next(iter(seeds.values()))
        rows[method] = {
            "seeds": ", ".join(map(str, seeds)),
            "rewards": ", ".join(run.rewards),
            "balancer": run.balancer,
            "optimizer steps": run.evaluated.get("optimizer_step"),
            "seconds a round": round(median(seconds_of_round(run) for run in seeds.values()), 1),
            "peak memory": memory(list(seeds.values())),
        }
    return pandas.DataFrame.from_dict(rows, orient="index")


def seconds_of_round(run: Run) -> float:
    """Median time of a round."""
    return sum(median(values) for phase in PHASES if (values := run.curve(f"time/{phase}").values))


def memory(runs: list[Run]) -> str:
    """Median peak memory of runs, of the GPU or of the process; empty if none has recorded it."""
    recorded = [run.peak_memory for run in runs if run.peak_memory is not None]
    by_kind = {kind: [peak["gib"] for peak in recorded if peak["of"] == kind] for kind in ("GPU", "process")}
    return ", ".join(f"{median(peaks):.2f} GiB ({kind})" for kind, peaks in by_kind.items() if peaks)


def changes(found: Collection) -> pandas.DataFrame:
    """Held-out change of each reward and metric, with its 95 % interval over seeds and prompts."""
    rows = {"base": {name: f"{float(base):.4f}" for name, base in zip(found.columns, base_means(found), strict=True)}}
    for method in found.methods:
        columns = found.changes(method).unbind(2)
        rows[method] = {name: written(column) for name, column in zip(found.columns, columns, strict=True)}
    return pandas.DataFrame.from_dict(rows, orient="index")


def base_means(found: Collection) -> Tensor:
    """Mean held-out scores of the base; runs of one machine and seed of evaluation have the same."""
    means = []
    for run in found.runs:
        order = [run.reward_models.index(name) for name in found.columns]
        assert run.base is not None
        means.append(run.base[:, order].nanmean(0))
    return torch.stack(means).mean(0)


def written(changes: Tensor) -> str:
    """A mean with its interval; with one seed, with its standard error over prompts."""
    if len(changes) == 1:
        single = summarise(changes[0])
        return f"{single.mean:+.4f} ± {single.error:.4f}"
    return of_interval(crossed_interval(changes))


def of_interval(interval: Interval) -> str:
    """A mean with the ends of its interval."""
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def gains(found: Collection, reference: str) -> pandas.DataFrame | None:
    """Normalised gains, the least first, and its difference to the reference's with a 99 % interval.

    None if there are no specialists.
    """
    specialists = found.changes_of_specialists()
    if specialists is None:
        return None
    count, rows = len(found.rewards), {}
    for method, seeds in found.methods.items():
        changes = found.changes(method)[:, :, :count]
        of_rewards = normalised_gains(changes, specialists)
        of_runs = torch.stack([normalised_gains(single[None], specialists) for single in changes])
        known = of_runs[of_runs.isfinite()]
        rows[method] = {
            "least": f"{float(of_rewards[of_rewards.isfinite()].min()):+.2f}" if len(known) else "",
            "mean": f"{float(of_rewards.nanmean()):+.2f}",
            "interquartile mean": f"{interquartile_mean(known):+.2f}" if len(known) else "",
            **{
                name: f"{gain:+.2f}" if gain == gain else "-"
                for name, gain in zip(found.rewards, of_rewards.tolist(), strict=True)
            },
        }
        common = [seed for seed in seeds if seed in found.methods[reference]]
        if method != reference and len(common) > 1 and len(specialists) > 1 and len(known):
            one, other = (found.changes(name, common)[:, :, :count] for name in (method, reference))
            rows[method][f"least - {reference}'s"] = of_interval(least_gain_difference(one, other, specialists))
    return pandas.DataFrame.from_dict(rows, orient="index").fillna("")


def verdicts(found: Collection, reference: str) -> pandas.DataFrame:
    """Each method beside the reference: paired difference, probability of improvement, p-value by Holm over the table."""
    rows = []
    for method, seeds in found.methods.items():
        common = [seed for seed in seeds if seed in found.methods[reference]]
        if method == reference or len(common) < 2:
            continue
        one, other = found.changes(method, common), found.changes(reference, common)
        for index, name in enumerate(found.columns):
            means = [changes[:, :, index].nanmean(1) for changes in (one, other)]
            difference = (one - other)[:, :, index]
            rows.append(
                {
                    "method": method,
                    "reward": name,
                    "seeds": len(common),
                    "difference": of_interval(crossed_interval(difference)),
                    "probability of improvement": round(probability_of_improvement(*means), 2),
                    "p": crossed_p_value(difference),
                    "sign": float(difference.nanmean()),
                }
            )
    if not rows:
        return pandas.DataFrame()
    frame = pandas.DataFrame(rows)
    frame["p (Holm)"] = holm(torch.tensor(frame["p"].to_numpy())).numpy()
    better = frame["sign"].map(lambda sign: "better" if sign > 0 else "worse")
    frame["verdict"] = better.where(frame["p (Holm)"] <= 0.05, "not separable")
    return frame.drop(columns="sign").round({"p": 4, "p (Holm)": 4})


def images(found: Collection) -> pandas.DataFrame:
    """Image statistics of the last tenth of the rounds, divided by those of the first round."""
    rows = {}
    for method, seeds in found.methods.items():
        row = {}
        for name in NAMES:
            curves = [values for run in seeds.values() if (values := run.curve(f"images/{name}").values)]
            if curves:
                ratios = [torch.tensor(values[-max(1, len(values) // 10) :]).mean().item() / values[0] for values in curves]
                row[name] = f"x {sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows[method] = row
    return pandas.DataFrame.from_dict(rows, orient="index")
