"""Ablations beside the published ones: whether a change of settings moves each reward in the same direction."""

from __future__ import annotations

from collections.abc import Sequence

import pandas
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from balancers.gramian import in_conflict
from marble_lightning.evaluation.statistics import Interval, crossed_interval, summarise
from marble_lightning.lab.paper import ABLATIONS, FAILS, HARMONY, REFERENCE
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.report.plots import panels
from marble_lightning.lab.runs import Run


def same_order(difference: Interval, published: float) -> str:
    """Whether a measured and a published difference of two variants have the same sign.

    Args:
        difference: Measured difference with its interval.
        published: Published difference.

    Returns:
        `within noise` where the interval contains 0 or is unknown, else `yes`, `no`, or `tied in the paper`.

    >>> same_order(Interval(-0.2, -0.3, -0.1), -0.08), same_order(Interval(-0.2, -0.5, 0.1), -0.08)
    ('yes', 'within noise')
    """
    if not (difference.low > 0 or difference.high < 0):
        return "within noise"
    if published == 0:
        return "tied in the paper"
    return "yes" if (difference.mean > 0) == (published > 0) else "no"


def interval(changes: Float[Tensor, "seed prompt"]) -> Interval:
    """95 % interval of a mean: over seeds and prompts, or with one seed over prompts only, by its standard error."""
    if len(changes) > 1:
        return crossed_interval(changes)
    single = summarise(changes[0])
    return Interval(single.mean, single.mean - 1.96 * single.error, single.mean + 1.96 * single.error)


def beside_paper(found: Collection, variants: Sequence[str], reference: str = REFERENCE) -> pandas.DataFrame:
    """Differences of variants to a reference beside the published ones, a row for each variant and published reward.

    Differences are paired by seed, prompt and noise. A variant has no row if it has not run, shares no seed with the
    reference, or is not in the paper.

    Args:
        found: The runs; methods have the names of `paper.ABLATIONS`.
        variants: The variants of the table.
        reference: The variant that they are compared with.
    """
    rows = []
    for variant in variants:
        if variant == reference or variant not in found.methods or variant not in ABLATIONS:
            continue
        common = [seed for seed in found.methods[variant] if seed in found.methods[reference]]
        if not common:
            continue
        differences = found.changes(variant, common) - found.changes(reference, common)
        for name, score in ABLATIONS[variant].items():
            if name not in found.columns:
                continue
            published = ABLATIONS[reference][name]
            difference = interval(differences[:, :, found.columns.index(name)])
            rows.append(
                {
                    "variant": variant,
                    "reward": name,
                    f"difference to {reference}": "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference),
                    f"paper: {reference}": f"{published:g}",
                    "paper: variant": "fails" if score == FAILS else f"{score:g}",
                    "same order?": same_order(difference, score - published),
                }
            )
    return pandas.DataFrame(rows)


def change_figure(found: Collection, variants: Sequence[str]) -> Figure:
    """The held-out change of each reward by variant with its 95 % interval, a panel for each reward."""
    shown = [variant for variant in variants if variant in found.methods]
    figure, axes = panels(len(found.rewards), len(found.rewards))
    for column, (axis, name) in enumerate(zip(axes, found.rewards, strict=True)):
        intervals = [interval(found.changes(variant)[:, :, column]) for variant in shown]
        means = [of_variant.mean for of_variant in intervals]
        sides = [[mean - of_variant.low, of_variant.high - mean] for mean, of_variant in zip(means, intervals, strict=True)]
        axis.errorbar(means, range(len(shown)), xerr=list(zip(*sides, strict=True)), fmt="o", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.6)
        axis.axvline(means[0], color="tab:blue", linewidth=0.6, linestyle="--")
        axis.set_yticks(range(len(shown)), shown if axis is axes[0] else [""] * len(shown))
        axis.invert_yaxis()
        axis.locator_params(axis="x", nbins=4)
        axis.set_title(name)
    return figure


def harmony_beside_paper(run: Run) -> pandas.DataFrame:
    """The paper's statistics of cosines with each reward's gradient: means over steps, beside the published ones.

    MARBLE's update is taken at its refreshes, on the images that it was solved on. The other directions come from probes
    (`gradient_alignment.probe_every`), on the images of the probed step. A direction that was not logged has no row.
    """
    probes = [f"probe/{kind}/own" for kind in ("solved", "reused")]
    directions = {
        "MARBLE": ["harmony/update"],
        "weighted sum": [f"{probe}/weighted_sum" for probe in probes],
        "mean of the gradients": [f"{probe}/mean" for probe in probes],
        "random direction": [f"{probe}/random" for probe in probes],
    }
    rows = {}
    for direction, places in directions.items():
        values = {
            name: [value for place in places for value in run.curve(f"{place}/{key}").values]
            for name, key in (("worst", "cos_min"), ("mean", "cos_mean"), ("variance", "cos_var"))
        }
        if count := len(values["worst"]):
            row = {name: sum(of_steps) / count for name, of_steps in values.items()}
            row["conflicts"] = sum(map(in_conflict, values["worst"])) / count
            paper = {f"paper: {name}": value for name, value in HARMONY.get(direction, {}).items()}
            rows[direction] = {"steps": count, **row, **paper}
    return pandas.DataFrame.from_dict(rows, orient="index")
