"""A figure that compares methods: normalised gains, one panel for each reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.fits import changes_of
from benchmarks.method_tables import Results, Specialists
from marble_lightning.evaluation.gains import normalised_gains
from marble_lightning.evaluation.statistics import crossed_interval, crossed_summary


def write_gains_figure(results: Results, names: Sequence[str], specialists: Specialists, file: Path) -> None:
    """Draw the normalised gain of each reward by each method; the method with the largest least gain is on top.

    Bars are 95 % intervals of the change over seeds and prompts, divided by the specialist's mean change; with one seed
    there are none. The least gain of each method is drawn larger. Rewards whose specialist gains less than 3 standard errors
    have no panel.

    Args:
        results: Figures of runs.
        names: The rewards that the methods train on.
        specialists: Changes by the specialists, with these rewards as columns.
        file: The image.

    Raises:
        ValueError: No specialist gains 3 standard errors.
    """
    from matplotlib.figure import Figure

    gains = {
        method: normalised_gains(changes_of(list(runs.values()), names), specialists) for method, runs in results.items()
    }
    shown = [column for column, gain in enumerate(next(iter(gains.values()))) if gain.isfinite()]
    if not shown:
        raise ValueError("A figure of gains needs a specialist that gains at least 3 standard errors. Found none.")
    methods = sorted(gains, key=lambda method: float(gains[method][shown].min()))
    figure = Figure(figsize=(1.6 + 1.7 * len(shown), 1.2 + 0.28 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, shown, strict=True):
        unit = crossed_summary(specialists[:, :, column]).mean
        for row, method in enumerate(methods):
            changes, gain = changes_of(list(results[method].values()), [names[column]])[:, :, 0], gains[method]
            is_least = bool(gain[column] == gain[shown].min())
            if len(changes) > 1:
                interval = crossed_interval(changes)
                axes.plot([interval.low / unit, interval.high / unit], [row, row], color="grey", linewidth=1.2, zorder=1)
            axes.plot(float(gain[column]), row, "o", color="C3" if is_least else "C0", markersize=7 if is_least else 5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set_title(names[column], fontsize=10)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(methods)), methods)
    figure.supxlabel("normalised gain: 0 is the base, 1 a run on this reward alone; red: the method's least", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
