"""`marble-lightning report`: finished runs, compared on one page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

import pandas
from PIL import Image

from marble_lightning.lab.report import tables
from marble_lightning.lab.report.collect import collect
from marble_lightning.lab.report.harmony import harmony_of_runs
from marble_lightning.lab.report.progress import progress
from marble_lightning.lab.report.sections import SECTIONS, Section
from marble_lightning.utils.validation import require

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 12.5px; margin: 1em 0; display: block; overflow-x: auto; }
td, th { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; }
td span, th:first-child { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; }
img { max-width: 100%; } h2 { margin-top: 2em; border-bottom: 2px solid #ddd; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } table { display: table; font-size: 8px; }
  section { break-inside: avoid-page; } }
"""


def write_report(runs: Sequence[Path], to: Path, reference: str | None) -> Path:
    """Write the report, and return the file of the page."""
    found = collect(runs)
    reference = reference or next(iter(found.methods))
    require(reference in found.methods, f"`reference` must be one of {', '.join(found.methods)}", reference)
    for run in progress(found.everything, "Reading curves", "run"):
        run.load()
    built = (build(found, reference) for build in progress(SECTIONS, "Drawing", "section"))
    sections = [section for section in built if section is not None]
    to.mkdir(parents=True, exist_ok=True)
    tables.scores(found).to_csv(to / "scores.csv", index=False)
    harmony_of_runs(found).to_csv(to / "harmony_runs.csv", index=False)
    for section in sections:
        if section.table is not None:
            section.table.to_csv(to / f"{section.name}.csv")
        for name, image in (section.images or {}).items():
            image.save(to / f"{name}.png", optimize=True)
    (to / "report.md").write_text("\n".join(map(markdown, sections)), encoding="utf-8")
    (to / "report.html").write_text(page(sections, to), encoding="utf-8")
    return to / "report.html"


def markdown(section: Section) -> str:
    """A section in Markdown."""
    rows = "" if section.table is None or section.table.empty else section.table.to_markdown()
    images = "\n".join(f"![{name}]({name}.png)" for name in section.images or {})
    return "\n".join([f"## {section.title}\n", section.prose, "", rows, "", images, ""])


def page(sections: list[Section], folder: Path) -> str:
    """The page, with everything in it; its images are the files in the folder."""
    parts = []
    for section in sections:
        images = "".join(figure(section, folder / f"{name}.png", image) for name, image in (section.images or {}).items())
        notes = "".join(f"<li>{words(note)}</li>" for note in section.notes)
        text = f"<p>{words(section.text)}</p>" + (f"<ul>{notes}</ul>" if notes else "")
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>{text}{table(section)}{images}</section>")
    head = f"<meta charset='utf-8'><title>Comparison of runs</title><style>{STYLE}</style>"
    body = f"<h1>Comparison of runs</h1>{''.join(parts)}"
    return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>"


def words(text: str) -> str:
    """A text in HTML.

    >>> words("`a` < b")
    '<code>a</code> &lt; b'
    """
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def table(section: Section) -> str:
    """The section's table; a cell may break before an interval or a range but not within it, nor before an error."""
    if section.table is None or section.table.empty:
        return ""
    numbered = isinstance(section.table.index, pandas.RangeIndex)
    whole = r"\[[^\]<]*\]|\([^)<]*\)|[-+][\d.]+ ± [\d.]+"
    return re.sub(whole, r"<span>\g<0></span>", section.table.to_html(border=0, index=not numbered))


def figure(section: Section, file: Path, image: Image.Image) -> str:
    """An image inside the page; one of several has its name below."""
    data = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(file.stem.removeprefix(f"{section.name}_"))
    below = f"<figcaption>{caption}</figcaption>" if len(section.images or {}) > 1 else ""
    width = round(image.width * 96 / image.info.get("dpi", (96, 96))[0])  # a browser has 96 pixels an inch
    return f"<figure><img alt='{caption}' width='{width}' src='data:image/png;base64,{data}'>{below}</figure>"
