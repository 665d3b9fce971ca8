"""The figures of a report."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib
import pandas
import torch
from PIL import Image

from balancers.gramian import in_conflict
from marble_lightning.evaluation.gains import normalised_gains
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.report.harmony import PLACES, chance_of, least_of_steps
from marble_lightning.lab.runs import Run

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot
from matplotlib.figure import Figure

WIDTH, HEIGHT = 3.1, 2.4
"""Size of one panel in inches."""
COLUMNS = 4
LEAST_WIDTH = 7.0
"""Width of a figure in inches that has room for the legend."""


def panels(count: int, columns: int = COLUMNS) -> tuple[Figure, list[Any]]:
    """A figure with that many panels."""
    columns = min(count, columns)
    rows = -(-count // columns)
    size = max(WIDTH * columns, LEAST_WIDTH), HEIGHT * rows + 0.4
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def colours(found: Collection) -> dict[str, Any]:
    """One colour for each method."""
    palette = pyplot.get_cmap("tab10" if len(found.methods) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    return dict(zip(found.methods, itertools.cycle(palette), strict=False))


def legend(figure: Figure, axis: Any) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def gains(found: Collection) -> Figure | None:
    """Normalised gain of each reward by method; None without specialists."""
    specialists = found.changes_of_specialists()
    if specialists is None:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    width = 0.8 / len(found.methods)
    for place, (method, colour) in enumerate(colours(found).items()):
        changes = found.changes(method)[:, :, : len(found.rewards)]
        heights = normalised_gains(changes, specialists)
        left = torch.arange(len(found.rewards)) + (place - (len(found.methods) - 1) / 2) * width
        axis.bar(left.tolist(), heights.tolist(), width, color=colour, label=method)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(found.rewards)), found.rewards)
    axis.set_ylabel("gain / specialist's gain")
    legend(figure, axis)
    return figure


def learning_curves(found: Collection) -> Figure:
    """Mean reward of a round's images: each run thin, the mean over seeds thick."""
    figure, axes = panels(len(found.rewards))
    for axis, name in zip(axes, found.rewards, strict=True):
        for method, colour in colours(found).items():
            plot_runs(axis, list(found.methods[method].values()), f"train/{name}", colour, method)
        axis.set(title=name, xlabel="optimizer step")
    legend(figure, axes[0])
    return figure


def weights(found: Collection) -> Figure | None:
    """Smoothed merging coefficients over time, a panel for each method that has them."""
    names = [f"alpha_smoothed/{reward}" for reward in found.rewards]
    having = [
        method
        for method, runs in found.methods.items()
        if any(next(iter(runs.values())).curve(name).values for name in names)
    ]
    if not having:
        return None
    figure, axes = panels(len(having))
    palette = pyplot.get_cmap("Dark2").colors  # type: ignore[attr-defined]
    for axis, method in zip(axes, having, strict=True):
        for reward, colour in zip(found.rewards, itertools.cycle(palette)):
            plot_runs(axis, list(found.methods[method].values()), f"alpha_smoothed/{reward}", colour, reward)
        low, high = axis.get_ylim()
        axis.set(title=method, xlabel="optimizer step", ylim=(min(low, 0), max(high, 0)))
    legend(figure, axes[0])
    return figure


def harmony(found: Collection) -> Figure | None:
    """Least cosine of the update over time, and the share of conflicts so far; None if no method has cosines."""
    least = {
        (place, method): least_of_steps(found.rewards, list(runs.values()), place)
        for place in PLACES
        for method, runs in found.methods.items()
    }
    places = [place for place in PLACES if any(len(least[place, method]) for method in found.methods)]
    if not places:
        return None
    figure, axes = panels(2 * len(places), 2)
    for row, place in enumerate(places):
        cosines, conflicts = axes[2 * row : 2 * row + 2]
        for method, colour in colours(found).items():
            of_method = least[place, method]
            plot_series(cosines, of_method.groupby(level=0).mean(), color=colour, label=method)
            plot_series(conflicts, so_far(of_method.map(in_conflict)), color=colour)
            if place == "split":
                plot_series(conflicts, so_far(chance_of(list(found.methods[method].values()))), color=colour, linestyle="--")
        cosines.axhline(0, color="grey", linewidth=0.6)
        cosines.set(title=f"least cosine, {place}", xlabel="optimizer step")
        conflicts.set(title=f"conflicts so far, {place}", xlabel="optimizer step", ylim=(-0.05, 1.05))
    legend(figure, axes[0])
    return figure


def so_far(values: pandas.Series[Any]) -> pandas.Series[float]:
    """Mean of all values up to each step."""
    return values.sort_index().expanding().mean().groupby(level=0).last()


def plot_series(axis: Any, series: pandas.Series[float], **style: Any) -> None:
    """A line by step; nothing for an empty series."""
    if len(series):
        axis.plot(series.index, series, linewidth=1.2, **style)


def plot_runs(axis: Any, runs: list[Run], name: str, colour: Any, label: str) -> None:
    """One curve of several runs, and their mean over the steps that all have."""
    curves = [dict(zip(*run.curve(name), strict=True)) for run in runs]
    for curve in curves:
        axis.plot(list(curve), list(curve.values()), color=colour, linewidth=0.6, alpha=0.35)
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
    axis.plot(steps, means, color=colour, linewidth=1.8, label=label)


def trade_offs(found: Collection) -> Figure | None:
    """Changes of each pair of rewards: a dot for each run, a larger one for the mean; None with a single reward."""
    pairs = list(itertools.combinations(range(len(found.rewards)), 2))
    if not pairs:
        return None
    figure, axes = panels(len(pairs), 5)
    for axis, (i, j) in zip(axes, pairs, strict=True):
        for method, colour in colours(found).items():
            means = found.changes(method).nanmean(1)
            axis.scatter(means[:, i], means[:, j], color=colour, s=10, alpha=0.5)
            axis.scatter(means[:, i].mean(), means[:, j].mean(), color=colour, s=60, label=method, edgecolor="black")
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.axvline(0, color="grey", linewidth=0.6)
        axis.set(xlabel=found.rewards[i], ylabel=found.rewards[j])
    legend(figure, axes[0])
    return figure


def sheets(found: Collection) -> dict[str, Image.Image]:
    """Held-out images of the base and of a run of each method."""
    base = next(filter(None, (run.sheet(0) for run in found.examples.values())), None)
    files = {"base": base} | {method: run.trained_sheet for method, run in found.examples.items()}
    return {name: Image.open(file).convert("RGB") for name, file in files.items() if file is not None}
