"""Held-out scores as a table: base -> trained, with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor


class Summary(NamedTuple):
    """Mean and standard error of the scores that are there, and how many there are."""

    mean: float
    error: float
    n: int


def summarise(scores: Float[Tensor, " prompt"]) -> Summary:
    """Mean, standard error of the mean and number of the scores that are not NaN."""
    there = scores[~scores.isnan()].double()
    n = len(there)
    error = float(there.std() / n**0.5) if n > 1 else float("nan")
    return Summary(float(there.mean()) if n else float("nan"), error, n)


def per_prompt(rows: Float[Tensor, "picture index_and_judge"], images: int) -> Float[Tensor, "prompt judge"]:
    """Mean scores of each prompt, in the prompts' order: pictures of one prompt are no independent evidence.

    Args:
        rows: Each picture's index, then its scores; in any order, and repeated where ranks were padded.
        images: Pictures of a prompt, which have neighbouring indices.
    """
    indices, first = np.unique(rows[:, 0].numpy(), return_index=True)
    prompts = torch.from_numpy(indices).long() // images
    scores = rows[torch.from_numpy(first), 1:]
    return torch.stack([scores[prompts == prompt].nanmean(0) for prompt in prompts.unique()])


def changes(base: Float[Tensor, "prompt judge"], trained: Float[Tensor, "prompt judge"]) -> list[Summary]:
    """Change of each judge's score, prompt by prompt: both columns share prompts and noise, so errors are paired."""
    return [summarise(column) for column in (trained - base).T]


def held_out_table(
    names: Sequence[str],
    scores: Float[Tensor, "prompt judge"],
    *,
    heading: str = "trained",
    base: Float[Tensor, "prompt judge"] | None = None,
) -> Table:
    """The table shown after `fit`, `validate` and `test`.

    Args:
        names: Names of the judges.
        scores: What they say, NaN where they do not apply.
        heading: Whose scores these are.
        base: Scores of the base on the same prompts and noise; adds its column and the change.
    """
    columns = {heading: [summarise(column) for column in scores.T]}
    if base is not None:
        columns = {"base": [summarise(column) for column in base.T], **columns, "change": changes(base, scores)}
    table = Table(title="Held-out prompts, mean ± standard error")
    table.add_column("reward", no_wrap=True)
    for title in ("n", *columns):
        table.add_column(title, justify="right", no_wrap=True)
    for index, name in enumerate(names):
        cells = [f"{cell.mean:{'+' if title == 'change' else ''}.4f} ± {cell.error:.4f}" for title, cell in
                 ((title, column[index]) for title, column in columns.items())]  # fmt: skip
        table.add_row(name, str(columns[heading][index].n), *cells)
    return table
