"""Held-out scores as a table: base -> trained, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

MEAN_OF_TAGS = "mean_of_tags"
"""Beside the tags themselves: a benchmark's score, where its tags count alike."""


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


def tags_table(
    scores: Mapping[str, Float[Tensor, " prompt"]],
    *,
    heading: str = "trained",
    base: Mapping[str, Float[Tensor, " prompt"]] | None = None,
) -> Table:
    """Means tag by tag, a column for each judge that tells tags apart.

    Args:
        scores: By judge and tag, as `geneval/counting`, NaN for prompts with another tag.
        heading: Whose scores these are.
        base: Scores of the base on the same prompts and noise, put before the others.
    """
    judges, tags = (list(dict.fromkeys(name.split("/", 1)[part] for name in scores)) for part in (0, 1))
    table = Table(title=f"By tag, {heading if base is None else f'base -> {heading}'}")
    table.add_column("tag", no_wrap=True)
    for judge in judges:
        table.add_column(judge, justify="right", no_wrap=True)
    for tag in sorted(tags, key=lambda tag: (tag == MEAN_OF_TAGS, tag)):
        table.add_row(tag, *(" -> ".join(_means(f"{judge}/{tag}", base, scores)) for judge in judges))
    return table


def _means(name: str, *columns: Mapping[str, Tensor] | None) -> list[str]:
    return [f"{each[name].nanmean():.4f}" for each in columns if each is not None and name in each]
