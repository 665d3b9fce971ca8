"""Held-out scores as a table: base -> trained, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from rich.table import Table
from torch import Tensor


class Summary(NamedTuple):
    """Mean and standard error of the scores that are there, and how many there are."""

    mean: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def summarise(scores: Float[Tensor, " picture"]) -> Summary:
    """Mean, standard error of the mean and number of the scores that are not NaN."""
    there = scores[~scores.isnan()].double()
    n = len(there)
    error = float(there.std() / n**0.5) if n > 1 else float("nan")
    return Summary(float(there.mean()) if n else float("nan"), error, n)


def changes(base: Float[Tensor, "picture judge"], trained: Float[Tensor, "picture judge"]) -> list[Summary]:
    """Change of each judge's score, picture by picture: both columns share prompts and noise, so errors are paired."""
    return [summarise(column) for column in (trained - base).T]


def held_out_table(
    names: Sequence[str], trained: Float[Tensor, "picture judge"], base: Float[Tensor, "picture judge"] | None
) -> Table:
    """The table shown after `fit`, `validate` and `test`.

    Args:
        names: Names of the judges.
        trained: Scores of the averaged adapter.
        base: Scores of the base on the same prompts and noise, where they were measured.
    """
    comparable = base is not None and base.shape == trained.shape
    table = Table(title="Held-out prompts, mean ± standard error")
    table.add_column("reward", no_wrap=True)
    for heading in ("n", *(("base",) if comparable else ()), "trained", *(("change",) if comparable else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    differences = changes(base, trained) if comparable and base is not None else []
    for index, name in enumerate(names):
        after = summarise(trained[:, index])
        cells = [str(after.n)]
        if comparable and base is not None:
            cells.append(str(summarise(base[:, index])))
        cells.append(str(after))
        if comparable:
            change = differences[index]
            cells.append(f"{change.mean:+.4f} ± {change.error:.4f}")
        table.add_row(name, *cells)
    return table
