"""The figures that say what a stage is: spreads, correlations, base scores, and the transfer matrix. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from marble_lightning.evaluation.gains import LEAST_RATIO
from marble_lightning.evaluation.statistics import Summary, crossed_summary, summarise


def within_prompt_spread(scores: Float[Tensor, "prompt image reward"]) -> Float[Tensor, " reward"]:
    """Standard deviation of each reward among the images of a prompt: the root of the mean variance over prompts.

    Args:
        scores: Scores of single images, NaN where a reward does not apply to the prompt; at least 2 images a prompt.

    Returns:
        NaN for a reward that applies to no prompt.
    """
    return scores.var(1).nanmean(0).sqrt()


def within_prompt_correlations(scores: Float[Tensor, "prompt image reward"]) -> Float[Tensor, "reward reward"]:
    """Correlation of each pair of rewards among the images of a prompt, over the prompts that both apply to.

    Scores are centred within each prompt, and all images together give one Pearson correlation. NaN where no prompt has
    both, or a reward does not vary.

    Args:
        scores: As in `within_prompt_spread`.
    """
    centred = scores - scores.mean(1, keepdim=True)
    centred = centred.flatten(0, 1).double()
    valid = centred.isfinite()
    filled = torch.where(valid, centred, 0)
    variances = filled.square().T @ valid.double()  # of a row's reward over the images that the column's reward also has
    return filled.T @ filled / (variances * variances.T).sqrt()


def transfer_matrix(changes: Sequence[Float[Tensor, "seed prompt reward"]]) -> list[list[Summary]]:
    """Change of every reward by runs that train on one reward each.

    Args:
        changes: Item i has the changes by the runs trained on reward i alone; their columns are the rewards.

    Returns:
        Row i: the changes by training on reward i.
    """
    return [[crossed_summary(column) for column in of_specialist.unbind(2)] for of_specialist in changes]


def relative_transfer(matrix: Sequence[Sequence[Summary]]) -> Float[Tensor, "trained measured"]:
    """Each change of reward j as a share of the change by training on reward j itself.

    NaN in columns whose own change is below 3 standard errors: there is nothing to divide by.
    """
    means = torch.tensor([[cell.mean for cell in row] for row in matrix], dtype=torch.float64)
    measured = torch.tensor([matrix[index][index].errors >= LEAST_RATIO for index in range(len(matrix))])
    return means / torch.where(measured, means.diagonal(), torch.nan)


def trade_offs(matrix: Sequence[Sequence[Summary]], names: Sequence[str], members: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (trained, measured) of a stage's rewards where training on one makes another worse, by > 3 errors.

    Args:
        matrix: From `transfer_matrix`.
        names: Rewards of its rows and columns.
        members: Rewards of the stage.
    """
    return [
        (one, other)
        for one, row in zip(names, matrix, strict=True)
        for other, cell in zip(names, row, strict=True)
        if one != other and {one, other} <= set(members) and cell.errors < -LEAST_RATIO
    ]


def base_figures(records: Sequence[Mapping[str, Any]], images: int, names: Sequence[str]) -> dict[str, Any]:
    """Base scores with standard errors over prompts, spreads and correlations.

    Args:
        records: Scores of each image, as `predict` writes them, in the order of the prompts.
        images: Images of each prompt.
        names: Rewards and metrics.

    Returns:
        `rewards`, and by reward `mean`, `error`, `prompts` and `spread`; `correlations` as a matrix. NaN becomes null.

    Raises:
        ValueError: The records are not whole prompts.
    """
    if len(records) % images or any(
        record["prompt"] != records[index // images * images]["prompt"] for index, record in enumerate(records)
    ):
        raise ValueError(f"There must be {images} images of each prompt, one after another. Found other records.")
    rows = [[record["scores"].get(name, torch.nan) for name in names] for record in records]
    scores = torch.tensor(rows, dtype=torch.float64).reshape(-1, images, len(names))
    means = [summarise(column) for column in scores.mean(1).unbind(1)]
    return {
        "rewards": list(names),
        "mean": _rounded([summary.mean for summary in means]),
        "error": _rounded([summary.error for summary in means]),
        "prompts": [summary.n for summary in means],
        "spread": _rounded(within_prompt_spread(scores).tolist()),
        "correlations": [_rounded(row) for row in within_prompt_correlations(scores).tolist()],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(value, 5) if value == value else None for value in values]
