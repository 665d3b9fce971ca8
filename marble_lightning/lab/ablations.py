"""Ablations beside the published ones: whether a change of settings moves each reward in the same direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor

from balancers.gramian import in_conflict
from marble_lightning.evaluation.cells import of_interval, of_p_value
from marble_lightning.evaluation.statistics import Interval, holm, mean_or_interval
from marble_lightning.lab.paper import ABLATIONS, FAILS, HARMONY, REFERENCE
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.report.plots import panels
from marble_lightning.lab.runs import Run


def variants(optimizer_steps: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Settings of every ablation, by group and by the names of `paper.ABLATIONS`; each changes `balancers/marble_paper`.

    Two of them needed a choice. In the authors' code a weight divides, so `weights` is the paper's 1:1:1:2:2 if its last two
    are OCR and GenEval, and `preference` asks for the opposite. The probability of `dropout` is ours.

    Args:
        optimizer_steps: Those of a whole run, of which `final_uniform` ends the last fifth with equal coefficients.
    """
    averaged = {"estimate_share": 1, "ema_decay": 0, "gram_decay": 0.9}
    options: dict[str, dict[str, dict[str, Any]]] = {
        "normalisation": {"no_normalisation": {"normalize": False}},
        "fixed alpha": {"fixed_alpha": {"uniform_after_step": 0}},
        "cadence": {f"every_{steps}": {"refresh_every": steps} for steps in (1, 5, 20)},
        "smoothing": {f"rho_{rho}": {"ema_decay": rho} for rho in (0, 0.1, 0.3, 0.5, 0.9)},
        "weights": {
            "weights": {"preference": {"ocr": 0.5, "geneval": 0.5}},
            "preference": {"preference": {"ocr": 2, "geneval": 2}},
        },
        "dropout": {"dropout": {"dropout": 0.2}},
        "final stage": {"final_uniform": {"uniform_after_step": int(0.8 * optimizer_steps)}},
        "share": {"share_1": {"estimate_share": 1}},
        "refresh alpha": {"smoothed_alpha": {"refresh_alpha": "smoothed"}},
        "gram": {"gram_plain": averaged, "gram_split": {**averaged, "gram": "split"}},
    }
    settings = {
        group: {name: {"balancer": {"init_args": changed}} for name, changed in of_group.items()}
        for group, of_group in options.items()
    }
    return settings | {"advantages": {"std_group": {"model": {"objective": {"advantage_std": "group"}}}}}


def same_order(difference: float, p_value: float, published: float) -> str:
    """Whether a measured and a published difference of two variants have the same sign.

    Args:
        difference: Measured difference.
        p_value: Of no difference, corrected for the number of comparisons.
        published: Published difference.

    Returns:
        `within noise` where the p-value is above 0.05, else `yes`, `no`, or `tied in the paper`.

    >>> same_order(-0.2, 0.01, -0.08), same_order(-0.2, 0.2, -0.08)
    ('yes', 'within noise')
    """
    if p_value > 0.05:
        return "within noise"
    if published == 0:
        return "tied in the paper"
    return "yes" if (difference > 0) == (published > 0) else "no"


def interval(changes: Float[Tensor, "seed prompt"]) -> Interval:
    """95 % interval of a mean over seeds and prompts; with one seed over prompts, of a normal distribution."""
    found = mean_or_interval(changes)
    if isinstance(found, Interval):
        return found
    low, high = norm.interval(0.95, found.mean, found.error)
    return Interval(found.mean, low, high, min(1.0, 2 * norm.sf(abs(found.errors))))  # 1 without an error


def beside_paper(found: Collection, shown: Sequence[str], reference: str = REFERENCE) -> pandas.DataFrame:
    """`differences_beside_paper` of runs. A variant has no row if it has not run or shares no seed with the reference.

    Args:
        found: The runs; methods have the names of `paper.ABLATIONS`.
        shown: The variants of the table.
        reference: The variant that they are compared with.
    """
    differences = {}
    for variant in shown:
        if variant == reference or variant not in found.methods:
            continue
        if common := [seed for seed in found.methods[variant] if seed in found.methods[reference]]:
            differences[variant] = found.changes(variant, common) - found.changes(reference, common)
    return differences_beside_paper(differences, found.columns, reference)


def differences_beside_paper(
    differences: Mapping[str, Float[Tensor, "seed prompt reward"]], names: Sequence[str], reference: str = REFERENCE
) -> pandas.DataFrame:
    """Differences of variants to a reference beside the published ones, a row for each variant and published reward.

    P-values are corrected for the number of rows by Holm's method; a difference counts if its own is at most 0.05.

    Args:
        differences: Held-out change by each variant minus that by the reference, paired by seed, prompt and noise. A variant
            that is not in the paper has no row.
        names: The rewards of the last dimension.
        reference: The variant that they are compared with.
    """
    shown = [
        (variant, name, score, interval(difference[:, :, list(names).index(name)]))
        for variant, difference in differences.items()
        for name, score in ABLATIONS.get(variant, {}).items()
        if name in names
    ]
    corrected = holm(torch.tensor([measured.p_value for *_, measured in shown])).tolist()
    rows = []
    for (variant, name, score, measured), p_value in zip(shown, corrected, strict=True):
        published = ABLATIONS[reference][name]
        rows.append(
            {
                "variant": variant,
                "reward": name,
                f"difference to {reference}": of_interval(measured),
                "p (Holm)": of_p_value(p_value),
                f"paper: {reference}": f"{published:g}",
                "paper: variant": "fails" if score == FAILS else f"{score:g}",
                "same order?": same_order(measured.mean, p_value, score - published),
            }
        )
    return pandas.DataFrame(rows)


def change_figure(found: Collection, shown: Sequence[str]) -> Figure:
    """The held-out change of each reward by variant with its 95 % interval, a panel for each reward."""
    shown = [variant for variant in shown if variant in found.methods]
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
