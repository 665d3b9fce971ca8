"""`marble-lightning report`: finished runs, compared on one page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas
from PIL import Image

from marble_lightning.lab.report import plots, tables
from marble_lightning.lab.report.collect import Collection, collect
from marble_lightning.utils.validation import require

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 12.5px; margin: 1em 0; display: block; overflow-x: auto; }
td, th { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } h2 { margin-top: 2em; border-bottom: 2px solid #ddd; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } table { display: table; font-size: 8px; }
  section { break-inside: avoid-page; } }
"""


class Section(NamedTuple):
    """A part of the page: a title, what to read from it, and a table or images."""

    name: str
    title: str
    text: str
    table: pandas.DataFrame | None = None
    images: dict[str, Image.Image] | None = None


def write_report(runs: Sequence[Path], to: Path, reference: str | None) -> Path:
    """Write the report, and return the file of the page."""
    found = collect(runs)
    reference = reference or next(iter(found.methods))
    require(reference in found.methods, f"`reference` must be one of {', '.join(found.methods)}", reference)
    sections = list(sections_of(found, reference))
    to.mkdir(parents=True, exist_ok=True)
    tables.scores(found).to_csv(to / "scores.csv", index=False)
    for section in sections:
        if section.table is not None:
            section.table.to_csv(to / f"{section.name}.csv")
        for name, image in (section.images or {}).items():
            image.save(to / f"{name}.png", optimize=True)
    (to / "report.md").write_text("\n".join(map(markdown, sections)), encoding="utf-8")
    (to / "report.html").write_text(page(sections), encoding="utf-8")
    return to / "report.html"


def sections_of(found: Collection, reference: str) -> Iterator[Section]:
    """The sections that the runs have data for."""
    left_out = "".join(f" Left out, since it has no results: {folder}." for folder in found.unfinished)
    yield Section("methods", "Runs", f"What ran, and what a round cost.{left_out}", tables.methods(found))
    gains = tables.gains(found, reference)
    if gains is None:
        missing = [name for name in found.rewards if name not in found.specialists]
        text = f"Normalised gains need a run on each reward alone. There is none on {', '.join(missing)}."
        yield Section("gains", "Normalised gains", text)
    else:
        text = (
            "A reward's gain as a share of the gain by a run on it alone (dashed line). The least decides: it is that of "
            "the reward that a method neglects. The difference has a 99 % interval."
        )
        yield Section("gains", "Normalised gains", text, gains, drawn("gains_figure", plots.gains(found)))
    text = "Held-out change with its 95 % interval by a crossed bootstrap over seeds and prompts; ± is a standard error."
    yield Section("changes", "Change of each reward", text, tables.changes(found))
    text = (
        f"Differences to {reference}, paired by seed, prompt and noise, with 95 % intervals. P-values are corrected for the "
        "number of rows by Holm's method; a verdict needs 0.05."
    )
    verdicts = tables.verdicts(found, reference)
    if len(verdicts):
        yield Section("verdicts", f"Beside {reference}", text, verdicts)
    text = "Mean reward of the images of a round: each run thin, the mean over seeds thick."
    yield Section("curves", "Learning curves", text, None, drawn("curves", plots.learning_curves(found)))
    text = "Each dot is a run, each large one the mean of a method; the base is at the crossing of the lines."
    yield Section("trade_offs", "Trade-offs", text, None, drawn("trade_offs", plots.trade_offs(found)))
    text = "The smoothed weights of the rewards' gradients."
    yield Section("weights", "Weights over time", text, None, drawn("weights", plots.weights(found)))
    text = (
        "Cosines of the update with each reward's gradient. On its own images a solved direction looks good by "
        "construction; products of halves do not share the noise. Compare conflicts with `by chance`, of no signal."
    )
    yield Section("harmony", "Does an update serve every reward?", text, tables.harmony(found))
    text = "Norm of a reward's gradient over the error of its estimate in one step: below 1 a step is mostly noise."
    yield Section("noise", "Signal and noise", text, tables.noise(found))
    text = "Statistics of the last tenth of the rounds, divided by those of the first; far from 1, look for reward hacking."
    yield Section("image_statistics", "Image statistics", text, tables.images(found))
    text = "Held-out images of the run with the lowest seed; the same prompts and noise."
    yield Section(
        "images",
        "Images",
        text,
        None,
        {f"images_{name.replace('/', '_')}": sheet for name, sheet in plots.sheets(found).items()},
    )


def drawn(name: str, figure: plots.Figure | None) -> dict[str, Image.Image]:
    """A figure as an image."""
    if figure is None:
        return {}
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150)
    plots.pyplot.close(figure)
    return {name: Image.open(buffer).convert("RGB")}


def empty(section: Section) -> bool:
    """Whether a section has neither a table nor an image; its text may still say why."""
    return (section.table is None or section.table.empty) and not section.images


def markdown(section: Section) -> str:
    """A section in Markdown."""
    table = "" if section.table is None or section.table.empty else section.table.to_markdown()
    images = "\n".join(f"![{name}]({name}.png)" for name in section.images or {})
    return "\n".join([f"## {section.title}\n", section.text, "", table, "", images, ""])


def page(sections: list[Section]) -> str:
    """The page, with everything in it."""
    parts = []
    for section in sections:
        table = "" if section.table is None or section.table.empty else section.table.to_html(border=0)
        images = "".join(f"<figure>{tag(name, image)}</figure>" for name, image in (section.images or {}).items())
        parts.append(
            f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>{table}{images}</section>"
        )
    head = f"<meta charset='utf-8'><title>Comparison of runs</title><style>{STYLE}</style>"
    body = f"<h1>Comparison of runs</h1>{''.join(parts)}"
    return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def tag(name: str, image: Image.Image) -> str:
    """An image inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(name)}' src='data:image/png;base64,{data}'><figcaption>{html.escape(name)}</figcaption>"
