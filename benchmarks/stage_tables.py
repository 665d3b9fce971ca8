"""Tables of what a stage is, in Markdown, and the heat map of its transfer matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stage_figures import relative_transfer, trade_offs
from marble_lightning.evaluation.cells import of_summary
from marble_lightning.evaluation.gains import LEAST_RATIO
from marble_lightning.evaluation.statistics import Summary


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [headings, *rows]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0], "|---" * len(headings) + "|", *texts[1:]])


def base_table(base: Mapping[str, Any], members: Mapping[str, Sequence[str]]) -> str:
    """Base score, spread within a prompt and stages of each reward.

    Args:
        base: From `base_figures`.
        members: Names of each stage's rewards.
    """
    rows = []
    for index, name in enumerate(base["rewards"]):
        stages = [stage for stage, names in members.items() if name in names]
        cells = (number(base[key][index]) for key in ("mean", "error", "spread"))
        mean, error, spread = cells
        rows.append([name, str(base["prompts"][index]), f"{mean} ± {error}", spread, ", ".join(stages) or "metric only"])
    return table(["reward", "prompts", "base score ± standard error", "spread within a prompt", "stages"], rows)


def correlations_table(base: Mapping[str, Any]) -> str:
    """Correlation of each pair of rewards among the images of a prompt; the upper half."""
    names = base["rewards"]
    rows = [
        [name, *("" if column <= row else number(value, "+.2f") for column, value in enumerate(base["correlations"][row]))]
        for row, name in enumerate(names)
    ]
    return table(["", *names], rows)


def transfer_table(matrix: Sequence[Sequence[Summary]], names: Sequence[str], measured: Sequence[str]) -> str:
    """Change of every reward by training on one; bold where it falls by more than 3 standard errors.

    Args:
        matrix: Changes by trained and by measured reward.
        names: Rewards that a run trained on.
        measured: Rewards and metrics of the columns.
    """
    rows = [[name, *map(cell, row)] for name, row in zip(names, matrix, strict=True)]
    return table(["trained on", *measured], rows)


def cell(found: Summary) -> str:
    """A change with its standard error."""
    text = of_summary(found)
    return f"**{text}**" if found.errors < -LEAST_RATIO else text


def trade_offs_text(matrix: Sequence[Sequence[Summary]], names: Sequence[str], members: Mapping[str, Sequence[str]]) -> str:
    """The trade-offs of each stage, one line each."""
    lines = []
    for stage, rewards in members.items():
        pairs = [f"{one} costs {other}" for one, other in trade_offs(matrix, names, rewards)]
        lines.append(f"- {stage}, trade-offs: {', '.join(pairs) or 'none'}")
    return "\n".join(lines)


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def write_heat_map(matrix: Sequence[Sequence[Summary]], names: Sequence[str], file: Path) -> None:
    """Draw the transfer matrix: colour is the change as a share of that by training on the measured reward itself.

    Cells have the change and, below it, its number of standard errors. Grey: training on this reward alone changes it by
    less than 3 standard errors.

    Args:
        matrix: From `transfer_matrix`.
        names: Rewards of rows and columns.
        file: The image.
    """
    from matplotlib.figure import Figure

    shares = relative_transfer(matrix)
    figure = Figure(figsize=(1.5 + 1.1 * len(names), 1.2 + 0.8 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    drawn = axes.imshow(shares.numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row, of_row in enumerate(matrix):
        for column, found in enumerate(of_row):
            colour = "white" if abs(shares[row, column]) > 0.7 else "black"
            text = f"{found.mean:+.3f}\n{found.errors:+.1f} SE"
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("change of")
    axes.set_ylabel("trained on")
    figure.colorbar(drawn, label="share of the change by training on it alone")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
