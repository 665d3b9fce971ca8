"""The sections of a report: a table or figures, and how to read them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pandas
from PIL import Image

from marble_lightning.evaluation.gains import LEAST_RATIO
from marble_lightning.lab.report import plots, tables
from marble_lightning.lab.report.collect import Collection
from marble_lightning.lab.report.harmony import harmony_of_methods, noise


class Section(NamedTuple):
    """A part of the page: a title, what to read from it, and a table or images; `notes` make a list below the text."""

    name: str
    title: str
    text: str
    table: pandas.DataFrame | None = None
    images: dict[str, Image.Image] | None = None
    notes: Sequence[str] = ()

    @property
    def prose(self) -> str:
        """The text and the notes in Markdown."""
        return "\n\n".join([self.text, "\n".join(f"- {note}" for note in self.notes)]).strip()


def runs(found: Collection, reference: str) -> Section:
    """What ran, what a round cost, and what sets runs apart besides their method."""
    text = (
        "What ran, and what a round and a run cost: medians over seeds. A run's hours are those of sampling, waiting for "
        "scores and training in all rounds, of all parts of a resumed run; evaluations come on top."
    )
    table = tables.methods(found)
    if table["rewards"].nunique() == 1:
        text += f" All were trained on {table.pop('rewards').iloc[0]}."
    left_out = [f"Left out, since it has no results: {folder}." for folder in found.unfinished]
    return Section("methods", "Runs", text, table, notes=[*found.notes, *left_out])


def gains(found: Collection, reference: str) -> Section:
    """Normalised gains, or why there are none."""
    table = tables.gains(found, reference)
    if table is None:
        missing = [name for name in found.rewards if name not in found.specialists]
        text = f"Normalised gains need a run on each reward alone. There is none on {', '.join(missing)}."
        return Section("gains", "Normalised gains", text)
    text = (
        "A reward's gain as a share of the gain by a run on it alone (dashed line). The least decides: it is that of "
        "the reward that a method neglects."
    )
    notes = [*notes_on_differences(found, table), *unknown_gains(found, table), *unused_specialists(found)]
    return Section("gains", "Normalised gains", text, table, drawn("gains_figure", plots.gains(found)), notes)


def notes_on_differences(found: Collection, table: pandas.DataFrame) -> list[str]:
    """What the differences of gains are, or why there are none."""
    if "p (Holm)" in table:
        return ["Differences have 99 % intervals."]
    alone = len(found.used_seeds(found.rewards[0]))
    few = f"Differences need two seeds in common with the reference, and two runs on each reward alone; used: {alone}."
    return [few] if len(found.methods) > 1 else []


def unknown_gains(found: Collection, table: pandas.DataFrame) -> list[str]:
    """Rewards without a gain, which no mean and no least gain counts."""
    unknown = [name for name in found.rewards if (table[name] == "-").all()]
    reason = f"runs on it alone gained less than {LEAST_RATIO:.0f} standard errors, too little to divide by"
    return [f"No gain of {name}, and none counted in the least and the mean: {reason}." for name in unknown]


def unused_specialists(found: Collection) -> list[str]:
    """Which seeds of specialists the gains leave out."""
    alone = {name: (list(found.specialists[name]), found.used_seeds(name)) for name in found.rewards}
    unused = {
        name: ", ".join(map(str, seeds[len(used) :])) for name, (seeds, used) in alone.items() if len(seeds) > len(used)
    }
    if not unused:
        return []
    count = len(found.used_seeds(found.rewards[0]))
    seeds = "; ".join(f"{name} seed {of_reward}" for name, of_reward in unused.items())
    return [f"Of each reward's runs, {count} are used, as many as the reward with the fewest has; left out: {seeds}."]


def changes(found: Collection, reference: str) -> Section:
    """Held-out changes."""
    missing = tables.left_out(found)
    left_out = f" Left out here and below, since not every seed has a score: {'; '.join(missing)}." if missing else ""
    text = (
        "Held-out change with its 95 % interval by a crossed bootstrap over seeds and prompts; ± is a standard error. "
        f"`prompts` is the number of prompts with a score.{left_out}"
    )
    return Section("changes", "Change of each reward", text, tables.changes(found))


def verdicts(found: Collection, reference: str) -> Section | None:
    """Differences to the reference; None if no other method shares two seeds with it."""
    text = (
        f"Differences to {reference}, paired by seed, prompt and noise, with 95 % intervals. P-values are corrected for the "
        f"number of rows by Holm's method; a verdict needs 0.05 and {tables.LEAST_SEEDS} common seeds. With fewer seeds "
        "intervals are too narrow and p-values too small: in simulations a nominal 99 % interval covers 96.7 % with 3 "
        "seeds, and 98.2 % with 5, where seeds vary most."
    )
    table = tables.verdicts(found, reference)
    return Section("verdicts", f"Beside {reference}", text, table) if len(table) else None


def curves(found: Collection, reference: str) -> Section:
    """Learning curves."""
    text = "Mean reward of the images of a round: each run thin, the mean over seeds thick."
    return Section("curves", "Learning curves", text, None, drawn("curves", plots.learning_curves(found)))


def trade_offs(found: Collection, reference: str) -> Section:
    """Changes of each pair of rewards."""
    text = "Each dot is a run, each large one the mean of a method; the base is at the crossing of the lines."
    return Section("trade_offs", "Trade-offs", text, None, drawn("trade_offs", plots.trade_offs(found)))


def weights(found: Collection, reference: str) -> Section:
    """Merging coefficients over time."""
    text = "The smoothed weights of the rewards' gradients."
    return Section("weights", "Weights over time", text, None, drawn("weights", plots.weights(found)))


def harmony(found: Collection, reference: str) -> Section:
    """Cosines of the update with each reward's gradient."""
    table = harmony_of_methods(found)
    missing = [name for name in found.methods if table.empty or name not in set(table["method"])]
    without = (
        f" No cosines were logged by {', '.join(missing)}; `gradient_alignment.probe_every` logs them." if missing else ""
    )
    text = (
        "Cosines of the update with each reward's gradient. On its own images a solved direction looks good by "
        "construction; products of halves do not share the noise, and as estimates may leave -1 to 1. Compare conflicts "
        "with `by chance`, of no signal. `weights` are those of the steps that solve (`update`), or of an earlier solution "
        "(`reused`): what most steps use, and what products of halves are right for. The figure has the least cosine of "
        "each step, a mean over seeds, and the share of conflicts up to it, by chance dashed. "
        f"harmony_runs.csv has the table for each run.{without}"
    )
    images = drawn("harmony_over_time", plots.harmony(found))
    return Section("harmony", "Does an update serve every reward?", text, table, images)


def signal(found: Collection, reference: str) -> Section:
    """Signal-to-noise ratios."""
    text = "Norm of the signal in a reward's gradient over that of its noise in one step: below 1 a step is mostly noise."
    return Section("noise", "Signal and noise", text, noise(found))


def image_statistics(found: Collection, reference: str) -> Section:
    """Whether images have left the range of the base."""
    text = (
        "Statistics of the last tenth of the rounds, divided by those of the first; far from 1, look for reward hacking. "
        "The first round stands for the base, but its prompts are others, so small differences are noise. Where its figure "
        "is 0, the quotient is 1 if the last is 0 too, else infinite."
    )
    return Section("image_statistics", "Image statistics", text, tables.images(found))


def images(found: Collection, reference: str) -> Section:
    """Held-out images."""
    shown = found.examples
    missing = {
        "of the base": [method for method, run in shown.items() if run.sheet(0) is None],
        "after training": [method for method, run in shown.items() if run.trained_sheet is None],
    }
    without = "".join(f" No images {of}: {', '.join(methods)}." for of, methods in missing.items() if methods)
    seeds = {run.seed for run in shown.values()}
    if len(seeds) == 1:
        common = f"with seed {seeds.pop()}; the same prompts and noise"
    else:
        common = "with its lowest seed; the same prompts, but the noise of each seed"
    text = f"Held-out images of a run of each method, {common}.{without}"
    sheets = {f"images_{name.replace('/', '_')}": sheet for name, sheet in plots.sheets(found).items()}
    return Section("images", "Images", text, None, sheets)


SECTIONS: tuple[Callable[[Collection, str], Section | None], ...] = (
    runs, gains, changes, verdicts, curves, trade_offs, weights, harmony, signal, image_statistics, images,
)  # fmt: skip
"""In the order of the page; each takes the runs and the reference, and is None where it has nothing to say."""


def drawn(name: str, figure: plots.Figure | None) -> dict[str, Image.Image]:
    """A figure as an image."""
    if figure is None:
        return {}
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plots.pyplot.close(figure)
    return {name: Image.open(buffer).convert("RGB")}
